"""Softmax attention with a cache of all keys and values: the baseline, with the verbs of augmented attention."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lin_jax.ops.activations import masked_softmax
from lin_jax.ops.linear_attention.state import Pending, along_path
from lin_jax.ops.product import product
from lin_jax.ops.tree import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the first `length_B` tokens of each row; slot s holds position s, whatever is behind them.

    Attributes:
        key_BKSD: keys. Heads come before slots: products with the cache then need no transposed copy of it.
        value_BKSE: values.
        length_B: tokens so far.
    """

    key_BKSD: Float[Array, "B K S D"]
    value_BKSE: Float[Array, "B K S E"]
    length_B: Int[Array, " B"]


def empty_cache(k_BTKD: Float[Array, "B T K D"], v_BTKE: Float[Array, "B T K E"], capacity: int) -> Cache:
    """The cache before the first token, with `capacity` slots, for keys and values of these shapes (T is any)."""
    slots = lambda x: jnp.zeros((x.shape[0], x.shape[2], capacity, x.shape[3]), x.dtype)  # noqa: E731
    return Cache(slots(k_BTKD), slots(v_BTKE), jnp.zeros(k_BTKD.shape[0], jnp.int32))


def append_to_cache(cache: Cache, tokens: Pending, count_B: Int[Array, " B"]) -> Cache:
    """The cache with the first `count_B` of each row's tokens, which must fit."""
    B, S = cache.key_BKSD.shape[0], cache.key_BKSD.shape[2]
    index_T = jnp.arange(tokens.key_BMKD.shape[1], dtype=jnp.int32)
    slot_BT = jnp.where(index_T[None] < count_B[:, None], cache.length_B[:, None] + index_T[None], S)
    put = lambda slots, new: slots.at[jnp.arange(B)[:, None], :, slot_BT].set(new, mode="drop")  # noqa: E731
    return Cache(
        key_BKSD=put(cache.key_BKSD, tokens.key_BMKD),
        value_BKSE=put(cache.value_BKSE, tokens.value_BMKE),
        length_B=cache.length_B + count_B,
    )


def commit_to_cache(cache: Cache, pending: Pending, path_BQ: Int[Array, "B Q"], count_B: Int[Array, " B"]) -> Cache:
    """The cache with the first `count_B` nodes of each row's path."""
    return append_to_cache(cache, along_path(pending, path_BQ), count_B)


def extend_softmax(
    q_BTHD: Float[Array, "B T H D"],
    cache: Cache,
    before_B: Int[Array, " B"],
    *,
    score_scale: float | None = None,
    bias_XH: Float[Array, "X #H"] | None = None,
) -> Float[Array, "B T H E"]:
    """Return outputs of tokens that are in the cache, the first of them behind `before_B` others.

    Args:
        q_BTHD: queries.
        cache: with the tokens' own keys and values.
        before_B: tokens before the first.
        score_scale: factor of q . k; None is 1 / sqrt(D).
        bias_XH: added to the scores, by distance; the last row is that of all larger ones too.
    """
    T, S = q_BTHD.shape[1], cache.key_BKSD.shape[2]
    position_BT = before_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    distance_BTS = position_BT[:, :, None] - jnp.arange(S, dtype=jnp.int32)[None, None]
    scores = _scores(q_BTHD, cache.key_BKSD, score_scale)
    if bias_XH is not None:
        scores += _bias(bias_XH, distance_BTS, scores.shape[1])
    weights = masked_softmax(scores, (distance_BTS >= 0)[:, None, None])
    return _merge_heads(product("bkjts,bkse->bkjte", weights.astype(q_BTHD.dtype), cache.value_BKSE), q_BTHD)


def verify_softmax(
    q_BMHD: Float[Array, "B M H D"],
    k_BMKD: Float[Array, "B M K D"],
    v_BMKE: Float[Array, "B M K E"],
    tree: Tree,
    cache: Cache,
    *,
    score_scale: float | None = None,
    bias_XH: Float[Array, "X #H"] | None = None,
) -> Float[Array, "B M H E"]:
    """Return outputs of all nodes of a tree, each as if its path had been appended to the tokens of the cache.

    y = sum over cached tokens and ancestors of softmax(score_scale q . k + bias) v, see `extend_softmax`.
    """
    S = cache.key_BKSD.shape[2]
    pair = cache.key_BKSD, k_BMKD.swapaxes(1, 2)
    scores = jnp.concatenate([_scores(q_BMHD, keys, score_scale) for keys in pair], axis=-1)
    if bias_XH is not None:
        scores += _bias(bias_XH, _tree_distances(tree, cache), scores.shape[1])
    weights = masked_softmax(scores, _seen(tree, cache)).astype(v_BMKE.dtype)
    y = product("bkjts,bkse->bkjte", weights[..., :S], cache.value_BKSE)
    y += product("bkjts,bkse->bkjte", weights[..., S:], v_BMKE.swapaxes(1, 2))
    return _merge_heads(y, q_BMHD)


def _seen(tree: Tree, cache: Cache) -> Bool[Array, "B 1 1 M SM"]:
    B, S = cache.key_BKSD.shape[0], cache.key_BKSD.shape[2]
    cached_BS = jnp.arange(S, dtype=jnp.int32)[None] < cache.length_B[:, None]
    cached_BMS = jnp.broadcast_to(cached_BS[:, None], (B, tree.nodes, S))
    nodes_BMM = jnp.broadcast_to(jnp.asarray(tree.ancestor_MM)[None], (B, tree.nodes, tree.nodes))
    return jnp.concatenate([cached_BMS, nodes_BMM], axis=-1)[:, None, None]


def _tree_distances(tree: Tree, cache: Cache) -> Int[Array, "B M SM"]:
    """Return how far nodes stand behind the slots of the cache, and behind each other."""
    depth_M = jnp.asarray(tree.depth_M, jnp.int32)
    slot_S = jnp.arange(cache.key_BKSD.shape[2], dtype=jnp.int32)
    slots_BMS = cache.length_B[:, None, None] + depth_M[None, :, None] - slot_S[None, None]
    nodes_MM = depth_M[:, None] - depth_M[None]
    return jnp.concatenate([slots_BMS, jnp.broadcast_to(nodes_MM[None], (len(slots_BMS), *nodes_MM.shape))], axis=-1)


def _bias(bias_XH: Array, distance_BTS: Array, K: int) -> Float[Array, "B K #J T S"]:
    """Return the bias of every score; of distances below 0 any numbers, as nothing sees them."""
    by_distance = bias_XH.astype(jnp.float32)[jnp.clip(distance_BTS, 0, bias_XH.shape[0] - 1)]
    B, T, S, H = by_distance.shape
    by_head = by_distance.transpose(0, 3, 1, 2)
    return by_head[:, :, None] if H == 1 else by_head.reshape(B, K, H // K, T, S)


def _scores(q_BTHD: Array, k_BKSD: Array, scale: float | None) -> Float[Array, "B K J T S"]:
    B, T, H, D = q_BTHD.shape
    K = k_BKSD.shape[1]
    scale = D**-0.5 if scale is None else scale
    return scale * product("btkjd,bksd->bkjts", q_BTHD.reshape(B, T, K, H // K, D), k_BKSD)


def _merge_heads(y_BKJTE: Array, like_BTHD: Array) -> Float[Array, "B T H E"]:
    return y_BKJTE.astype(like_BTHD.dtype).transpose(0, 3, 1, 2, 4).reshape(*like_BTHD.shape[:3], -1)
