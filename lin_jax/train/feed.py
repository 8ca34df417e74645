"""Batches from the rows that each process reads to arrays over all devices.

Which rows a process needs is asked of the sharding: under tensor or sequence parallelism several processes need the
same rows, and the mesh may give a process rows that do not follow each other.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding


class Feed:
    """This process's part in batches.

    Attributes:
        own: the numbers of the rows of a batch that this process's devices hold, or hold parts of; rising.
    """

    def __init__(self, sharding: NamedSharding, rows: int):
        """Batches of `rows` rows in all, cut by `sharding`."""
        self._sharding, self._rows = sharding, rows
        # Tokens are cut evenly: as many as there are devices can be cut by any axes.
        indices = sharding.addressable_devices_indices_map((rows, sharding.mesh.size)).values()
        self.own = np.unique(np.concatenate([np.arange(rows)[index[0]] for index in indices if index is not None]))

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Arrays [len(own), T] of each process as arrays [rows, T] over all devices."""
        return {name: self._global(array) for name, array in batch.items()}

    def _global(self, array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return array[np.searchsorted(self.own, np.arange(self._rows)[index[0]])][:, *index[1:]]

        return jax.make_array_from_callback((self._rows, *array.shape[1:]), self._sharding, part)
