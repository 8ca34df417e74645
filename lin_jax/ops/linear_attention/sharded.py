"""What a part of a row that is split over a mesh is told of the parts before it: a state.

Only what does not grow with the row crosses devices: the tokens of the open window, the last values for the
convolution, and the sum over all tokens before those, which is combined over the devices (`sum_before`).
"""

# Letters beyond the legend: U = values of the convolution's tail; Y = tokens that a state remembers, as if they stood
# before the row.

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lin_jax.ops.collectives import halo, sum_before
from lin_jax.ops.linear_attention.arguments import AttentionArrays, AttentionOptions
from lin_jax.ops.linear_attention.state import (
    AttentionState,
    Pending,
    empty_state,
    outer_sum,
    take_tokens,
    window_start,
)
from lin_jax.ops.shards import Shards


def state_before(
    shards: Shards,
    part: AttentionArrays,
    options: AttentionOptions,
    ids_BT: Int[Array, "B T"] | None,
    position_BT: Int[Array, "B T"],
) -> tuple[AttentionState, bool]:
    """Return the state that goes before this device's part of the rows, and whether it is known to end with a group.

    Args:
        shards: how the rows are split.
        part: the device's arrays.
        options: of the op.
        ids_BT: the device's segment ids.
        position_BT: of its tokens in their sequences.

    Raises:
        ValueError: the part is shorter than what the next one needs of it.
    """
    k, v, G = part.k_BTKD, part.v_BTKE, options.group_size
    T, aligned = k.shape[1], ids_BT is None and k.shape[1] % G == 0
    # Where groups begin anywhere, all slots of the open window but one may be full.
    reach = options.slots - (G if aligned else 1)
    most = max(reach, part.taps - 1)
    if most > T:
        raise ValueError(f"parts of {T} tokens are shorter than the {most} that the next one needs")

    row = Pending(k, part.grouped_k_BTKP, v)
    value = halo(v, most, shards.tokens, shards.parts)
    key, grouped_key = jax.tree.map(lambda x: halo(x, reach, shards.tokens, shards.parts), row[:2])
    window = Pending(key, grouped_key, _last(value, reach))
    length_B = position_BT[:, 0] if ids_BT is None else jnp.where(ids_BT[:, 0] != 0, position_BT[:, 0], 0)
    state = _open_window(window, value, length_B, part.taps, options)
    if options.grouped:
        fold = jax.checkpoint(_folded, static_argnums=(4, 5))
        reset_B, sums = fold(row, window, position_BT, length_B, aligned, options)
        earlier = sum_before(reset_B, sums, shards.tokens, shards.parts)
        state = dataclasses.replace(state, state_BKPE=jnp.where((length_B > 0)[:, None, None, None], earlier, 0))
    return state, aligned


def _open_window(
    window: Pending, value: Array, length_B: Array, taps: int, options: AttentionOptions
) -> AttentionState:
    """Return the state after `length_B` tokens whose last ones are given, but for what is folded."""
    empty = empty_state(window.key_BMKD, window.value_BMKE, options, grouped_k_BTKP=window.grouped_key_BMKP, taps=taps)
    start_B = window_start(length_B, options)
    slot_BS = start_B[:, None] + jnp.arange(options.slots, dtype=jnp.int32)[None]
    index_BS = slot_BS - (length_B - window.key_BMKD.shape[1])[:, None]
    valid_BS = (slot_BS >= 0) & (slot_BS < length_B[:, None])
    key, grouped_key, value_BSKE = jax.tree.map(lambda x: take_tokens(x, index_BS, valid_BS), window)
    tail = empty.tail_BUKE.shape[1]
    known_BU = length_B[:, None] + jnp.arange(-tail, 0, dtype=jnp.int32)[None] >= 0
    return dataclasses.replace(
        empty,
        key_BSKD=key,
        grouped_key_BSKP=grouped_key,
        value_BSKE=value_BSKE,
        tail_BUKE=jnp.where(known_BU[:, :, None, None], _last(value, tail), 0),
        length_B=length_B,
    )


def _folded(
    row: Pending, window: Pending, position_BT: Array, length_B: Array, aligned: bool, options: AttentionOptions
) -> tuple[Bool[Array, " B"], Float[Array, "B K P E"]]:
    """Return what this part adds to the state of the run that reaches its end.

    That is of its tokens and of those of the window before it. Tokens of the window that is open at its end are not yet
    folded.

    Returns:
        Whether that run began in this part, and the sum of phi(k) v^T.
    """
    T, reach = row.key_BMKD.shape[1], window.key_BMKD.shape[1]
    reset_B = position_BT[:, -1] < T
    if aligned:
        closed = jax.tree.map(lambda x: x[:, : T - reach], row)
        return reset_B, _outer_sum(window, None, options) + _outer_sum(closed, None, options)
    start_B, end_B = (window_start(x, options) for x in (length_B, position_BT[:, -1] + 1))
    of_run_BT = jnp.arange(-T, 0, dtype=jnp.int32)[None] + position_BT[:, -1:] + 1 >= 0
    row_BT = of_run_BT & (position_BT < end_B[:, None])
    position_BY = length_B[:, None] + jnp.arange(-reach, 0, dtype=jnp.int32)[None]
    window_BY = (position_BY >= jnp.maximum(start_B, 0)[:, None]) & ~reset_B[:, None]
    return reset_B, _outer_sum(window, window_BY, options) + _outer_sum(row, row_BT, options)


def _outer_sum(tokens: Pending, mask_BT: Array | None, options: AttentionOptions) -> Float[Array, "B K P E"]:
    key = tokens.key_BMKD if tokens.grouped_key_BMKP is None else tokens.grouped_key_BMKP
    return outer_sum(key, tokens.value_BMKE, mask_BT, options)


def _last(x: Array, count: int) -> Array:
    return x[:, x.shape[1] - count :]
