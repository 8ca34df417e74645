"""Matrices whose entries depend on the distance alone."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def toeplitz(by_distance: Float[Array, "X H"], zero: int, rows: int, columns: int, offset: int) -> Array:
    """Matrices [H, rows, columns] whose entry is row `zero + distance` of the table, 0 outside it.

    The distance of row i from column j is i + offset - j. Row i is the stretch from rows - 1 - i of one line of
    entries, so that repeating the line and cutting it one entry shorter makes all rows. A gather with an index a matrix
    entry needs that index in the program: for 2048 rows 42 MB of program text instead of 0.05.
    """
    X, H = by_distance.shape
    period = rows + columns
    index = zero + offset + rows - 1 - np.arange(period)
    inside = (index >= 0) & (index < X)
    line = jnp.where(inside[None], by_distance[np.clip(index, 0, X - 1)].T, 0)
    repeated = jnp.broadcast_to(line[:, None], (H, rows, period)).reshape(H, rows * period)
    skewed = repeated[:, rows - 1 : rows * period - 1].reshape(H, rows, period - 1)
    return skewed[..., :columns]
