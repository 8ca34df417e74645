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

    def __init__(self, shardings: Mapping[str, NamedSharding], by_row: NamedSharding, rows: int):
        """Prepare for batches of `rows` rows in all.

        Args:
            shardings: how each array of a batch is cut.
            by_row: how rows are, whatever is in them.
            rows: of a batch.
        """
        self._shardings, self._rows = shardings, rows
        indices = by_row.addressable_devices_indices_map((rows,)).values()
        self.own = np.unique(np.concatenate([np.arange(rows)[index[0]] for index in indices if index is not None]))

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Return arrays [len(own), ...] of each process as arrays [rows, ...] over all devices."""
        return {name: self._global(batch[name], sharding) for name, sharding in self._shardings.items()}

    def _global(self, array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return array[np.searchsorted(self.own, np.arange(self._rows)[index[0]])][:, *index[1:]]

        return jax.make_array_from_callback((self._rows, *array.shape[1:]), sharding, part)
