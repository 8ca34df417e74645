"""What the parts of a row that is split over devices send each other; for use inside `jax.shard_map`.

`axes` are the mesh axes that split the row, `parts` their size. What a part before the first one would send is zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

Axes = tuple[str, ...]


def from_earlier(x: Any, by: int, axes: Axes, parts: int) -> Any:
    """The arrays of the part that stands `by` parts before this one."""
    pairs = [(part, part + by) for part in range(parts - by)]
    return jax.tree.map(lambda array: jax.lax.ppermute(array, axes, pairs), x)


def halo(x_BT: Array, count: int, axes: Axes, parts: int) -> Array:
    """The `count` tokens, axis 1, that stand right before this part."""
    if not count:
        return x_BT[:, :0]
    return from_earlier(x_BT[:, x_BT.shape[1] - count :], 1, axes, parts)


def sum_before(reset_B: Bool[Array, " B"], sums: Array, axes: Axes, parts: int) -> Array:
    """The sum over earlier parts of `sums` [B, ...], back to the last one with `reset`, which counts still.

    Elements (r, S) combine to (r1, S1) + (r2, S2) = (r1 or r2, S2 if r2 else S1 + S2), here in log2(parts) rounds of
    messages after one from neighbour to neighbour, whatever the length of the row.
    """
    reset_B, sums = from_earlier((reset_B, sums), 1, axes, parts)
    reach = 1
    while reach < parts - 1:
        earlier_reset_B, earlier = from_earlier((reset_B, sums), reach, axes, parts)
        keep_B = ~reset_B
        sums += jnp.where(keep_B.reshape(-1, *(1,) * (sums.ndim - 1)), earlier, 0)
        reset_B |= earlier_reset_B
        reach *= 2
    return sums


def whole_rows(x_BT: Array, axes: Axes) -> Array:
    """All parts of the rows, axis 1, in their order."""
    return jax.lax.all_gather(x_BT, axes, axis=1, tiled=True)
