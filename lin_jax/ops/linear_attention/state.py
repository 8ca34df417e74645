"""The recurrent state of causal augmented attention: what later tokens need to know of earlier ones, and no more."""

# Letters beyond the legend: U = values of the convolution's tail; Y = tokens
# that a state remembers, as if they stood before the row.

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lin_jax.ops.layout import TokenLayout
from lin_jax.ops.linear_attention.arguments import AttentionArrays, AttentionOptions, with_features
from lin_jax.ops.product import product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionState:
    """State after `length_B` tokens; its size does not depend on them.

    With g = length // G, the window holds the groups g - R + 1 .. g: slot j is the token at position
    (g - R + 1) * G + j, and 0 where there is no such token yet. Earlier groups are folded into `state_BKPE`.

    Attributes:
        state_BKPE: float32 sum of phi(k_s) v_s^T over the folded groups.
        key_BSKD: keys of the local branch in the window.
        grouped_key_BSKP: keys of the grouped branch in the window, before the feature map; None where the local
            branch's keys serve both.
        value_BSKE: values in the window.
        tail_BUKE: values of the last U = W - 1 tokens, oldest first, for the convolution.
        length_B: tokens so far.
        normaliser_BKP: float32 sum of phi(k_s) over the folded groups, for a grouped branch with a denominator; None
            where there is none, as in all options so far.
    """

    state_BKPE: Float[Array, "B K P E"]
    key_BSKD: Float[Array, "B S K D"]
    grouped_key_BSKP: Float[Array, "B S K P"] | None
    value_BSKE: Float[Array, "B S K E"]
    tail_BUKE: Float[Array, "B U K E"]
    length_B: Int[Array, " B"]
    normaliser_BKP: Float[Array, "B K P"] | None = None


def empty_state(
    k_BTKD: Float[Array, "B T K D"],
    v_BTKE: Float[Array, "B T K E"],
    options: AttentionOptions,
    *,
    grouped_k_BTKP: Float[Array, "B T2 K P"] | None = None,
    taps: int = 0,
) -> AttentionState:
    """Return the state before the first token, for keys and values of these shapes and types (T does not matter).

    Args:
        k_BTKD: keys.
        v_BTKE: values.
        options: of the op.
        grouped_k_BTKP: the grouped branch's own keys, where it has some; with a map that has arrays, its features.
        taps: W of the convolution.
    """
    B, _, K, D = k_BTKD.shape
    E, S = v_BTKE.shape[-1], options.slots
    P = D if grouped_k_BTKP is None else grouped_k_BTKP.shape[-1]
    return AttentionState(
        state_BKPE=jnp.zeros((B, K, P, E), jnp.float32),
        key_BSKD=jnp.zeros((B, S, K, D), k_BTKD.dtype),
        grouped_key_BSKP=None if grouped_k_BTKP is None else jnp.zeros((B, S, K, P), grouped_k_BTKP.dtype),
        value_BSKE=jnp.zeros((B, S, K, E), v_BTKE.dtype),
        tail_BUKE=jnp.zeros((B, max(taps - 1, 0), K, E), v_BTKE.dtype),
        length_B=jnp.zeros(B, jnp.int32),
    )


class Pending(NamedTuple):
    """Tokens that may follow a state, as the state would hold them: the nodes of a verified tree, or plain tokens."""

    key_BMKD: Float[Array, "B M K D"]
    grouped_key_BMKP: Float[Array, "B M K P"] | None
    value_BMKE: Float[Array, "B M K E"]


def pending_tokens(arrays: AttentionArrays, options: AttentionOptions) -> Pending:
    """Return the tokens of the arrays as the state would hold them."""
    arrays, _ = with_features(arrays, options)
    return Pending(arrays.k_BTKD, arrays.grouped_k_BTKP, arrays.v_BTKE)


def along_path(pending: Pending, path_BQ: Int[Array, "B Q"]) -> Pending:
    """Return the nodes of each row's path, in its order."""
    return jax.tree.map(lambda x: jnp.take_along_axis(x, path_BQ[:, :, None, None], axis=1), pending)


class Context(NamedTuple):
    """The tokens that a state remembers, laid out as if they stood in the row just before its first token.

    The last slot is the token at position length - 1. `key` and `grouped_key` are 0 before the window, `value` is known
    as far back as window or tail reach; `folded` marks tokens that are only in the folded state, or before the start.
    """

    key_BYKD: Float[Array, "B Y K D"]
    grouped_key_BYKP: Float[Array, "B Y K P"] | None
    value_BYKE: Float[Array, "B Y K E"]
    position_BY: Int[Array, "B Y"]
    folded_BY: Bool[Array, "B Y"]


def take_tokens(x_BT: Array, index_BY: Int[Array, "B Y"], valid_BY: Bool[Array, "B Y"]) -> Array:
    """Return x at the indices along axis 1, and 0 where not valid."""
    if x_BT.shape[1] == 0:
        return jnp.zeros(index_BY.shape + x_BT.shape[2:], x_BT.dtype)
    clipped = jnp.clip(index_BY, 0, x_BT.shape[1] - 1)
    axes = (...,) + (None,) * (x_BT.ndim - 2)
    return jnp.where(valid_BY[axes], jnp.take_along_axis(x_BT, clipped[axes], axis=1), 0)


def window_start(length_B: Int[Array, " B"], options: AttentionOptions) -> Int[Array, " B"]:
    """Return the position of the window's first slot; negative while the window reaches before the sequence."""
    return (length_B // options.group_size - options.local_groups + 1) * options.group_size


def context_tokens(state: AttentionState, options: AttentionOptions) -> Context:
    """Lay the remembered tokens out in Y = max(S, W - 1) slots that end at position length - 1."""
    S, tail = state.key_BSKD.shape[1], state.tail_BUKE.shape[1]
    Y = max(S, tail)
    start_B = window_start(state.length_B, options)
    position_BY = state.length_B[:, None] - Y + jnp.arange(Y, dtype=jnp.int32)[None]
    slot_BY = position_BY - start_B[:, None]
    in_window_BY = (slot_BY >= 0) & (position_BY >= 0)
    value_BYKE = take_tokens(state.value_BSKE, slot_BY, in_window_BY)
    tail_slot_BY = jnp.broadcast_to(jnp.arange(Y, dtype=jnp.int32) - (Y - tail), position_BY.shape)
    from_tail_BY = (tail_slot_BY >= 0) & (position_BY >= 0) & ~in_window_BY
    grouped = state.grouped_key_BSKP
    return Context(
        key_BYKD=take_tokens(state.key_BSKD, slot_BY, in_window_BY),
        grouped_key_BYKP=None if grouped is None else take_tokens(grouped, slot_BY, in_window_BY),
        value_BYKE=value_BYKE + take_tokens(state.tail_BUKE, tail_slot_BY, from_tail_BY),
        position_BY=position_BY,
        folded_BY=~in_window_BY,
    )


def advance(
    initial: AttentionState,
    tokens: Pending,
    layout: TokenLayout,
    options: AttentionOptions,
    folded_BKPE: Float[Array, "B K P E"] | None = None,
) -> AttentionState:
    """Return the state after a row's last real token, of the sequence that token belongs to.

    A row of padding alone keeps its state. A row whose first token is real continues the initial state with its first
    run; every other run starts anew. `folded_BKPE` is the new state's, where it is known already.
    """
    k_BTKD, grouped_k_BTKP, v_BTKE = tokens
    context = context_tokens(initial, options)
    Y, T = context.position_BY.shape[1], k_BTKD.shape[1]
    index_T = jnp.arange(T, dtype=jnp.int32)
    last_B = jnp.max(jnp.where(layout.real_BT, index_T, -1), axis=1)
    any_B = last_B >= 0
    last_run_B = jnp.take_along_axis(layout.run_BT, jnp.maximum(last_B, 0)[:, None], axis=1)[:, 0]
    last_position_B = jnp.take_along_axis(layout.position_BT, jnp.maximum(last_B, 0)[:, None], axis=1)[:, 0]
    length_B = jnp.where(any_B, last_position_B + 1, initial.length_B)
    continues_B = ~any_B | (last_run_B == 0)

    start_B = window_start(length_B, options)
    if folded_BKPE is None:
        own_BT = layout.real_BT & (layout.run_BT == last_run_B[:, None])
        own_BY = ~context.folded_BY & continues_B[:, None]
        kept_BKPE = jnp.where(continues_B[:, None, None, None], initial.state_BKPE, 0)
        before = context.key_BYKD if context.grouped_key_BYKP is None else context.grouped_key_BYKP
        row = k_BTKD if grouped_k_BTKP is None else grouped_k_BTKP
        before_BY, row_BT = context.position_BY < start_B[:, None], layout.position_BT < start_B[:, None]
        folded_BKPE = (
            kept_BKPE
            + outer_sum(before, context.value_BYKE, own_BY & before_BY, options)
            + outer_sum(row, v_BTKE, own_BT & row_BT, options)
        )

    # Position p of the last run stands at index p + offset of the row, and those before the row in the context.
    offset_B = jnp.where(any_B, last_B - last_position_B, -initial.length_B)
    slots_BS = start_B[:, None] + jnp.arange(options.slots, dtype=jnp.int32)[None]
    tail_BU = length_B[:, None] + jnp.arange(-initial.tail_BUKE.shape[1], 0, dtype=jnp.int32)[None]

    def gather(before: Array | None, row: Array, position: Array) -> Array:
        assert before is not None
        valid = (position >= 0) & (position < length_B[:, None])
        index = position + offset_B[:, None]
        of_row, of_before = valid & (index >= 0), valid & (index < 0)
        return take_tokens(row, index, of_row) + take_tokens(before, Y + index, of_before)

    return AttentionState(
        state_BKPE=folded_BKPE,
        key_BSKD=gather(context.key_BYKD, k_BTKD, slots_BS),
        grouped_key_BSKP=None if grouped_k_BTKP is None else gather(context.grouped_key_BYKP, grouped_k_BTKP, slots_BS),
        value_BSKE=gather(context.value_BYKE, v_BTKE, slots_BS),
        tail_BUKE=gather(context.value_BYKE, v_BTKE, tail_BU),
        length_B=length_B,
    )


def outer_sum(
    key_BTKP: Float[Array, "B T K P"],
    v_BTKE: Float[Array, "B T K E"],
    mask_BT: Bool[Array, "B T"] | None,
    options: AttentionOptions,
) -> Float[Array, "B K P E"]:
    """Return the sum of phi(k) v^T over the tokens where the mask holds (None: over all), in float32."""
    phi_BTKP = options.inner_map.apply(key_BTKP)
    if mask_BT is not None:
        phi_BTKP = jnp.where(mask_BT[..., None, None], phi_BTKP, 0)
    return product("btkp,btke->bkpe", phi_BTKP, v_BTKE)
