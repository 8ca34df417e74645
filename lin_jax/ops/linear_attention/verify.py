"""Augmented attention of a tree of draft tokens, given the state of what went before; and keeping a path of it.

The equation is that of `augmented_attention` with another distance: a node sees its ancestors and the tokens before the
tree, at a distance of depths, and its group is floor((length + depth) / G). So the verified tree is exact also where it
crosses the end of a group, or several. The state changes only when a path is committed: rejected nodes are dropped.
"""

# Letters beyond the legend: U = values of the convolution's tail.

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lin_jax.ops.activations import ACTIVATIONS
from lin_jax.ops.layout import token_layout
from lin_jax.ops.linear_attention.arguments import (
    AttentionArrays,
    AttentionOptions,
    per_head,
    refuse_states,
    with_features,
)
from lin_jax.ops.linear_attention.state import AttentionState, Pending, advance, along_path, window_start
from lin_jax.ops.product import product
from lin_jax.ops.tree import Tree


class _Distances(NamedTuple):
    """Where nodes stand from the slots of the window and from each other; distances are of nodes from what they see."""

    slot_BMS: Int[Array, "B M S"]
    slot_known_BMS: Bool[Array, "B M S"]
    slot_groups_BMS: Int[Array, "B M S"]
    node_MM: np.ndarray
    node_groups_BMM: Int[Array, "B M M"]


def verify_tree(
    arrays: AttentionArrays, tree: Tree, state: AttentionState, options: AttentionOptions
) -> Float[Array, "B M H E"]:
    """Return outputs of all nodes of a tree, each as if its path had been appended to the tokens of the state.

    Args:
        arrays: of the nodes; a filter may have one tap more than the state's tail.
        tree: the nodes.
        state: of the tokens before the root.
        options: of the op.

    Raises:
        ValueError: options without states, or a filter that is longer.
    """
    refuse_states(options)
    arrays, options = with_features(arrays, options)
    q_BMHD, k_BMKD, v_BMKE = arrays.q_BTHD, arrays.k_BTKD, arrays.v_BTKE
    B, M, H, _ = q_BMHD.shape
    K, E = v_BMKE.shape[2:]
    by_head = lambda x: x.reshape(B, M, K, H // K, -1)  # noqa: E731
    distances = _distances(tree, state, options)
    y = jnp.zeros((B, K, H // K, M, E), jnp.float32)
    weights = None
    if options.scored:
        score = options.score_scale * _scores(by_head(q_BMHD), state.key_BSKD, k_BMKD)
        if arrays.bias_XH is not None:
            score += _bias(arrays.bias_XH, distances, K)
        weights = ACTIVATIONS[options.local].weights(score, _near(tree, distances, options.local_groups))
    if options.grouped:
        phi = options.inner_map.apply
        q = phi(by_head(q_BMHD if arrays.grouped_q_BTHP is None else arrays.grouped_q_BTHP))
        keys = [state.key_BSKD, k_BMKD]
        if arrays.grouped_k_BTKP is not None and state.grouped_key_BSKP is not None:
            keys = [state.grouped_key_BSKP, arrays.grouped_k_BTKP]
        alpha_H = per_head(arrays.alpha_H, H).reshape(1, K, H // K, 1, 1)
        y += alpha_H * product("bmkjp,bkpe->bkjme", q, state.state_BKPE.astype(q.dtype))
        score = alpha_H * _scores(q, *(phi(k) for k in keys))
        far = jnp.where(_far(tree, distances, options.local_groups), score, 0)
        weights = far if weights is None else weights + far
    if arrays.conv_WH is not None:
        taps, tail = _taps(arrays.conv_WH, tree, state, H).reshape(K, H // K, M, -1), state.tail_BUKE
        y += product("kjmu,buke->bkjme", taps[..., : tail.shape[1]].astype(tail.dtype), tail)
        # Slots of the window get no taps, as the tail holds their values.
        nodes = jnp.pad(taps[None, ..., tail.shape[1] :], ((0, 0),) * 4 + ((state.key_BSKD.shape[1], 0),))
        weights = nodes if weights is None else weights + nodes
    if weights is not None:
        weights = jnp.broadcast_to(weights, (B, *weights.shape[1:])).astype(v_BMKE.dtype)
        S = state.value_BSKE.shape[1]
        y += product("bkjms,bske->bkjme", weights[..., :S], state.value_BSKE)
        y += product("bkjmn,bnke->bkjme", weights[..., S:], v_BMKE)
    return y.astype(v_BMKE.dtype).transpose(0, 3, 1, 2, 4).reshape(B, M, H, E)


def commit_path(
    state: AttentionState,
    pending: Pending,
    path_BQ: Int[Array, "B Q"],
    count_B: Int[Array, " B"],
    options: AttentionOptions,
) -> AttentionState:
    """Return the state after the first `count_B` nodes of each row's path, which may be none.

    Most commits write a few slots of the window. Only where some row ends a group are windows moved and groups folded:
    that is a loop of no or one round, as a loop leaves the state where it is, and `lax.cond` copies it either way.
    """
    chosen, G = along_path(pending, path_BQ), options.group_size
    ends = jnp.any((state.length_B + count_B) // G != state.length_B // G)

    def fold(carry: tuple[Array, AttentionState]) -> tuple[Array, AttentionState]:
        return jnp.zeros_like(carry[0]), append(carry[1], chosen, count_B, options)

    _, state = jax.lax.while_loop(lambda carry: carry[0], fold, (ends, state))
    return _write(state, chosen, jnp.where(ends, 0, count_B), options)


def append(
    state: AttentionState, tokens: Pending, count_B: Int[Array, " B"], options: AttentionOptions
) -> AttentionState:
    """Return the state after the first `count_B` of each row's tokens."""
    real_BT = jnp.arange(tokens.key_BMKD.shape[1])[None] < count_B[:, None]
    return advance(state, tokens, token_layout(real_BT.astype(jnp.int32), state.length_B), options)


def _write(
    state: AttentionState, chosen: Pending, count_B: Int[Array, " B"], options: AttentionOptions
) -> AttentionState:
    """Return what `append` does where no row ends a group: the window stays, and the tokens fill its next slots."""
    B, S = state.key_BSKD.shape[:2]
    index_Q = jnp.arange(chosen.key_BMKD.shape[1], dtype=jnp.int32)
    slot_B = state.length_B - window_start(state.length_B, options)
    slot_BQ = jnp.where(index_Q[None] < count_B[:, None], slot_B[:, None] + index_Q[None], S)
    row_B1 = jnp.arange(B)[:, None]
    put = lambda window, tokens: window.at[row_B1, slot_BQ].set(tokens, mode="drop")  # noqa: E731
    tail_BU = count_B[:, None] + jnp.arange(state.tail_BUKE.shape[1], dtype=jnp.int32)[None]
    values = jnp.concatenate([state.tail_BUKE, chosen.value_BMKE], axis=1)
    grouped = state.grouped_key_BSKP
    return dataclasses.replace(
        state,
        key_BSKD=put(state.key_BSKD, chosen.key_BMKD),
        grouped_key_BSKP=None if grouped is None else put(grouped, chosen.grouped_key_BMKP),
        value_BSKE=put(state.value_BSKE, chosen.value_BMKE),
        tail_BUKE=jnp.take_along_axis(values, tail_BU[:, :, None, None], axis=1),
        length_B=state.length_B + count_B,
    )


def _distances(tree: Tree, state: AttentionState, options: AttentionOptions) -> _Distances:
    S, G, length_B = state.key_BSKD.shape[1], options.group_size, state.length_B
    start_B = window_start(length_B, options)
    slot_BS = start_B[:, None] + jnp.arange(S, dtype=jnp.int32)[None]
    node_BM = length_B[:, None] + tree.depth_M[None]
    groups_BM = node_BM // G
    known_BS = (slot_BS >= 0) & (slot_BS < length_B[:, None])
    return _Distances(
        slot_BMS=node_BM[:, :, None] - slot_BS[:, None],
        slot_known_BMS=jnp.broadcast_to(known_BS[:, None], (*node_BM.shape, S)),
        slot_groups_BMS=groups_BM[:, :, None] - slot_BS[:, None] // G,
        node_MM=tree.depth_M[:, None] - tree.depth_M[None],
        node_groups_BMM=groups_BM[:, :, None] - groups_BM[:, None],
    )


def _near(tree: Tree, distances: _Distances, local_groups: int) -> Bool[Array, "B 1 1 M SM"]:
    """What the local branch of each node sees: of the window, then of the nodes."""
    slots = distances.slot_known_BMS & (distances.slot_groups_BMS < local_groups)
    nodes = tree.ancestor_MM[None] & (distances.node_groups_BMM < local_groups)
    return jnp.concatenate([slots, nodes], axis=-1)[:, None, None]


def _far(tree: Tree, distances: _Distances, local_groups: int) -> Bool[Array, "B 1 1 M SM"]:
    """What has left the local window of a node without being folded into the state yet."""
    slots = distances.slot_known_BMS & (distances.slot_groups_BMS >= local_groups)
    nodes = tree.ancestor_MM[None] & (distances.node_groups_BMM >= local_groups)
    return jnp.concatenate([slots, nodes], axis=-1)[:, None, None]


def _bias(bias_XH: Float[Array, "X #H"], distances: _Distances, K: int) -> Float[Array, "B K J M SM"]:
    """The bias of each score; distances beyond the window are never seen."""
    X, heads = bias_XH.shape
    B = distances.slot_BMS.shape[0]
    nodes_BMM = jnp.broadcast_to(distances.node_MM[None], (B, *distances.node_MM.shape))
    distance = jnp.clip(jnp.concatenate([distances.slot_BMS, nodes_BMM], axis=-1), 0, X - 1)
    bias = jnp.moveaxis(bias_XH.astype(jnp.float32)[distance], -1, 1)
    return bias.reshape(B, K if heads > 1 else 1, -1, *distance.shape[1:])


def _taps(conv_WH: Float[Array, "W #H"], tree: Tree, state: AttentionState, heads: int) -> Float[Array, "H M UM"]:
    """Weights of the values of the tail, then of the nodes."""
    W, tail = conv_WH.shape[0], state.tail_BUKE.shape[1]
    if tail + 1 < W:
        raise ValueError(f"a filter of {W} taps needs a state with a tail of {W - 1} values, but it has {tail}")
    to_tail = tree.depth_M[:, None] + np.arange(tail, 0, -1)[None]
    to_node = np.where(tree.ancestor_MM, tree.depth_M[:, None] - tree.depth_M[None], W)
    distance = np.minimum(np.concatenate([to_tail, to_node], axis=1), W)
    padded = jnp.pad(conv_WH.astype(jnp.float32), ((0, 1), (0, 0)))
    taps = jnp.moveaxis(padded[distance], -1, 0)
    return jnp.broadcast_to(taps, (heads, *distance.shape))


def _scores(q: Float[Array, "B M K J D"], slots: Array, nodes: Array) -> Float[Array, "B K J M SM"]:
    """q . k of the window's slots, then of the nodes."""
    return jnp.concatenate([product("bmkjd,bskd->bkjms", q, k) for k in (slots, nodes)], axis=-1)
