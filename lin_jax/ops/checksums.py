"""Checksums of arrays: a changed byte inside an array is read back from a checkpoint without complaint."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@jax.jit
def _sum_on_device(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize])
    return jnp.sum(array.astype(jnp.uint32), dtype=jnp.uint32)


def _sum_on_host(array: jax.Array) -> int:
    """As on a device; XLA's CPU programs would take twice the array's memory for it."""
    shards = (np.asarray(shard.data) for shard in array.addressable_shards if shard.replica_id == 0)
    if jnp.issubdtype(array.dtype, jnp.floating):
        shards = (shard.view(_UNSIGNED[array.dtype.itemsize]) for shard in shards)
    return sum(int(np.sum(shard, dtype=np.uint32)) for shard in shards) % 2**32


def _sum_of_bits(array: jax.Array) -> int:
    """The sum of an array's bits as integers, modulo 2**32: the same however the array is cut."""
    on_host = array.is_fully_addressable and jax.default_backend() == "cpu"
    return _sum_on_host(array) if on_host else int(_sum_on_device(array))


def checksums(item: Any) -> dict[str, int]:
    """Return the sum of the bits of every array of a tree, by its path joined by dots."""
    leaves = jax.tree.leaves_with_path(item)
    return {jax.tree_util.keystr(path, simple=True, separator="."): _sum_of_bits(leaf) for path, leaf in leaves}


def require_checksums(items: Mapping[str, Any], meta: Mapping) -> None:
    """Raise `ValueError` unless the arrays of every item have the sums that `meta` has."""
    for name, item in items.items():
        for key, value in checksums(item).items():
            if value != meta["checksums"][name][key]:
                raise ValueError(f"{name}.{key} does not have the checksum it was saved with")
