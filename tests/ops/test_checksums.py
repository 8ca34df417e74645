"""Checksums of arrays."""

import jax
import pytest

from lin_jax.experiment import MeshConfig
from lin_jax.ops import checksums
from lin_jax.train import sharding


def test_checksums_notice_one_bit_and_not_the_mesh():
    values = jax.random.normal(jax.random.key(0), (16, 8))
    tree = {"a": values, "b": jax.numpy.arange(5), "c": values.astype("bfloat16"), "d": values > 0}
    partition = sharding.make_partition(MeshConfig(data=2, fsdp=4))
    cut = {**tree, "a": jax.device_put(values, sharding.batch_sharding(partition))}
    meta = {"checksums": {"model": checksums.checksums(tree)}}
    checksums.require_checksums({"model": cut}, meta)
    for name in "abc":
        other = tree[name].at[3].multiply(1.01) if name != "b" else tree[name].at[3].add(1)
        with pytest.raises(ValueError, match=f"model.{name} does not have the checksum"):
            checksums.require_checksums({"model": {**tree, name: other}}, meta)
