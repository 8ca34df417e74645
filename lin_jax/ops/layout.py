"""Where each token of a row stands: which sequence it belongs to, and its position there."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class TokenLayout(NamedTuple):
    """The place of every token in a row.

    Attributes:
        real_BT: False for padding.
        run_BT: number of the token's run; a run is a maximal stretch of equal segment ids. Run 0 holds the first token.
        position_BT: tokens of the same sequence before this one, those in the initial state included.
    """

    real_BT: Bool[Array, "B T"]
    run_BT: Int[Array, "B T"]
    position_BT: Int[Array, "B T"]


def token_layout(segment_ids_BT: Int[Array, "B T"], length_B: Int[Array, " B"]) -> TokenLayout:
    """Finds runs and positions.

    A segment id of 0 means padding; every other run of equal ids is a sequence of its own. A run that starts the row
    continues the sequence of which `length_B` tokens went before.

    Args:
        segment_ids_BT: segment of each token.
        length_B: tokens of the initial state, 0 where there is none.
    """
    B, T = segment_ids_BT.shape
    index_T = jnp.arange(T, dtype=jnp.int32)
    change_BT = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1]) != 0
    run_BT = jnp.cumsum(change_BT, axis=1, dtype=jnp.int32)
    start_BT = jax.lax.cummax(jnp.where(change_BT, index_T[None], 0), axis=1)
    position_BT = index_T[None] - start_BT + jnp.where(run_BT == 0, length_B[:, None], 0)
    return TokenLayout(segment_ids_BT != 0, run_BT, position_BT.astype(jnp.int32))
