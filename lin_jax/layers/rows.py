"""How tokens lie in their rows: positions, sequences, padding, and over which devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.ops.rows import positions
from lin_jax.ops.shards import Shards


class Rows(NamedTuple):
    """How tokens lie in their rows, the same for all layers.

    Attributes:
        position_BT: position of each token in its sequence.
        segment_ids_BT: sequences of a row, 0 for padding; None if every row is one sequence.
        value_mask_BT: 0 where attention must not see a value; only for `padding="released"`.
        partition: how all arrays of rows are cut.
        shards: how the arrays of attention are split, heads or channels of values included; None if they are not.
    """

    position_BT: Int[Array, "B T"]
    segment_ids_BT: Int[Array, "B T"] | None
    value_mask_BT: Float[Array, "B T"] | None
    partition: Partition
    shards: Shards | None


def place(
    segment_ids_BT: Int[Array, "B T"] | None,
    shape: tuple[int, int],
    partition: Partition = WHOLE,
    *,
    released_padding: bool = False,
    **names: str,
) -> Rows:
    """Return the rows of a batch.

    Args:
        segment_ids_BT: every run of equal ids is a sequence of its own, 0 is padding; None: a row is a sequence.
        shape: rows B and tokens T.
        partition: how they are cut.
        released_padding: whether padding only hides values, as in the released FLASH (`FlashConfig.padding`).
        names: logical axes of the attention's arrays, see `Partition.for_ops`.
    """
    in_row_BT = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    in_row_BT = partition.constrain(in_row_BT, "batch", "tokens")
    shards = partition.for_ops(**names)
    if segment_ids_BT is None:
        return Rows(in_row_BT, None, None, partition, shards)
    if released_padding:
        return Rows(in_row_BT, None, (segment_ids_BT != 0).astype(jnp.float32), partition, shards)
    return Rows(positions(segment_ids_BT, partition.for_ops()), segment_ids_BT, None, partition, shards)


def tokens_in_sequence(position_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the number of tokens in the sequence of each token; a position of 0 starts one."""
    T = position_BT.shape[1]
    index_T = jnp.arange(T, dtype=jnp.int32)[None]
    is_last_BT = jnp.pad(position_BT[:, 1:] == 0, ((0, 0), (0, 1)), constant_values=True)
    last_BT = jax.lax.cummin(jnp.where(is_last_BT, index_T, T), axis=1, reverse=True)
    return position_BT + 1 + last_BT - index_T
