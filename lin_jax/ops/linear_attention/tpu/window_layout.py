"""What a kernel is told of the tokens in each block's window where groups begin anywhere in a block.

A row is cut in blocks of `rows` tokens; the window of a block is the `back` tokens before it and its own. `FIELDS` are
integers a slot of the window, [B, N, fields, back + rows] for N blocks: some 50 bytes a token, for all heads.
"""

# Letters beyond the legend: U = values of the convolution's tail; Y = tokens that a state remembers, as if they stood
# before the row.

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lin_jax.ops.layout import token_layout
from lin_jax.ops.linear_attention.inputs import Inputs
from lin_jax.ops.linear_attention.state import context_tokens, window_start

# The entries of a slot, by index:
QUERY_RUN = 0  # run of the token as a query; -1: it is padding, or not one of this block's own
START = 1  # position of the first slot of the token's local window
POSITION = 2  # in its sequence
KEY_RUN = 3  # run of the token's key; -2: unknown or padding
VALUE_RUN = 4  # run of its value; -2: unknown or padding
STATE_RUN = 5  # run that the state before the window is of, the same in all slots
FOLD = (
    6  # whether the state after the block has the token: slots before `rows`; for the final state, slots from there on
)
KEEP = 7  # whether that state has what the one before has
FIELDS = 8

NOBODY = -2


def window_back(inputs: Inputs, rows: int, aligned: bool) -> int:
    """Tokens before a block of `rows` that its queries see one by one, or whose values the convolution needs.

    Args:
        inputs: of the op.
        rows: tokens in a block.
        aligned: whether groups are counted from the row's first token.
    """
    G, R = inputs.options.group_size, inputs.options.local_groups
    # The first query of a block stands at most that far inside its group.
    inside = G - (math.gcd(rows, G) if aligned else 1)
    taps = 0 if inputs.arrays.conv_WH is None else inputs.arrays.conv_WH.shape[0]
    local = 0 if not inputs.options.scored and not inputs.options.grouped else (R - 1) * G + inside
    if not inputs.fresh:
        taps = max(taps, inputs.initial_state.tail_BUKE.shape[1] + 1)
    return max(local, taps - 1, 0)


class _TokenFields(NamedTuple):
    """Fields [B, A] of the tokens before the row and of the row, padded to whole blocks."""

    run: Array
    position: Array
    real: Array
    key_known: Array
    value_known: Array


def window_fields(inputs: Inputs, rows: int, back: int) -> Int[Array, "B N fields S"]:
    """The fields of all slots of all windows; the final state's are in the last block."""
    tokens = _tokens(inputs, rows, back)
    blocks = (tokens.run.shape[1] - back) // rows
    # Padding belongs to no sequence, so the state stays with the last real token's.
    current = jax.lax.cummax(jnp.where(tokens.real, tokens.run, 0), axis=1)
    ends = jnp.pad(current[:, rows - 1 :: rows][:, :blocks], ((0, 0), (1, 0)))
    state_run, next_run, last_run = ends[:, :-1], ends[:, 1:], current[:, -1:]
    foldable = tokens.key_known & ~_stays_open(inputs, tokens, last_run)

    index = np.arange(blocks)[:, None] * rows + np.arange(back + rows)[None]

    def windows(x: Array) -> Array:
        return x[:, index]

    early = jnp.asarray(np.arange(back + rows) < rows)[None, None]
    is_last = jnp.asarray(np.arange(blocks) == blocks - 1)[None, :, None]
    run = windows(tokens.run)
    target = jnp.where(early, next_run[..., None], jnp.where(is_last, last_run[..., None], NOBODY))
    source = jnp.where(early, state_run[..., None], next_run[..., None])
    start = (tokens.position // inputs.options.group_size - inputs.options.local_groups + 1) * inputs.options.group_size
    fields = {
        QUERY_RUN: jnp.where(windows(tokens.real) & jnp.asarray(np.arange(back + rows) >= back)[None, None], run, -1),
        START: windows(start),
        POSITION: windows(tokens.position),
        KEY_RUN: windows(jnp.where(tokens.key_known, tokens.run, NOBODY)),
        VALUE_RUN: windows(jnp.where(tokens.value_known, tokens.run, NOBODY)),
        STATE_RUN: jnp.broadcast_to(state_run[..., None], run.shape),
        FOLD: windows(foldable) & (run == target),
        KEEP: source == target,
    }
    stacked = [jnp.broadcast_to(fields[i], run.shape).astype(jnp.int32) for i in range(FIELDS)]
    return jnp.stack(stacked, axis=2)


def _tokens(inputs: Inputs, rows: int, back: int) -> _TokenFields:
    T = inputs.arrays.q_BTHD.shape[1]
    layout = token_layout(inputs.segment_ids_BT, inputs.initial_state.length_B)
    of_row = _TokenFields(layout.run_BT, layout.position_BT, layout.real_BT, layout.real_BT, layout.real_BT)
    before = _before(inputs, back)
    end = -T % rows

    def join(before: Array, row: Array) -> Array:
        return jnp.concatenate([before, jnp.pad(row, ((0, 0), (0, end)))], axis=1)

    return jax.tree.map(join, before, of_row)


def _before(inputs: Inputs, back: int) -> _TokenFields:
    """The tokens before the row: those of the initial state, or nothing."""
    B = inputs.arrays.q_BTHD.shape[0]
    zeros, never = jnp.zeros((B, back), jnp.int32), jnp.zeros((B, back), bool)
    if inputs.fresh:
        return _TokenFields(zeros, zeros, never, never, never)
    context = context_tokens(inputs.initial_state, inputs.options)
    position = last_slots(context.position_BY, back)
    known = last_slots(~context.folded_BY, back)
    return _TokenFields(zeros, position, never, known, last_slots(context.position_BY >= 0, back))


def last_slots(x: Array, count: int) -> Array:
    """The last `count` along axis 1, with zeros before them where there are fewer."""
    missing = max(0, count - x.shape[1])
    return jnp.pad(x[:, max(0, x.shape[1] - count) :], ((0, 0), (missing, 0)) + ((0, 0),) * (x.ndim - 2))


def _stays_open(inputs: Inputs, tokens: _TokenFields, last_run: Array) -> Array:
    """Whether a token is in the window of the final state, and so in no state of a later token of its sequence."""
    ends = jnp.where(tokens.real & (tokens.run == last_run), tokens.position + 1, -1)
    length = jnp.max(ends, axis=1)
    length = jnp.where(length < 0, inputs.initial_state.length_B, length)
    start = window_start(length, inputs.options)
    return (tokens.run == last_run) & (tokens.position >= start[:, None])
