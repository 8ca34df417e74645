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


def extend_softmax(q_BTHD: Float[Array, "B T H D"], cache: Cache, before_B: Int[Array, " B"]) -> Array:
    """Outputs of tokens that are in the cache, the first of them behind `before_B` others: [B, T, H, E]."""
    T, S = q_BTHD.shape[1], cache.key_BKSD.shape[2]
    position_BT = before_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    seen_BTS = jnp.arange(S, dtype=jnp.int32)[None, None] <= position_BT[:, :, None]
    weights = masked_softmax(_scores(q_BTHD, cache.key_BKSD), seen_BTS[:, None, None])
    return _merge_heads(product("bkjts,bkse->bkjte", weights.astype(q_BTHD.dtype), cache.value_BKSE), q_BTHD)


def verify_softmax(
    q_BMHD: Float[Array, "B M H D"],
    k_BMKD: Float[Array, "B M K D"],
    v_BMKE: Float[Array, "B M K E"],
    tree: Tree,
    cache: Cache,
) -> Float[Array, "B M H E"]:
    """Outputs of all nodes of a tree, each as if its path had been appended to the tokens of the cache.

    y = sum over cached tokens and ancestors of softmax(q . k / sqrt(D)) v.
    """
    S = cache.key_BKSD.shape[2]
    scores = [_scores(q_BMHD, cache.key_BKSD), _scores(q_BMHD, k_BMKD.swapaxes(1, 2))]
    weights = masked_softmax(jnp.concatenate(scores, axis=-1), _seen(tree, cache)).astype(v_BMKE.dtype)
    y = product("bkjts,bkse->bkjte", weights[..., :S], cache.value_BKSE)
    y += product("bkjts,bkse->bkjte", weights[..., S:], v_BMKE.swapaxes(1, 2))
    return _merge_heads(y, q_BMHD)


def _seen(tree: Tree, cache: Cache) -> Bool[Array, "B 1 1 M SM"]:
    B, S = cache.key_BKSD.shape[0], cache.key_BKSD.shape[2]
    cached_BS = jnp.arange(S, dtype=jnp.int32)[None] < cache.length_B[:, None]
    cached_BMS = jnp.broadcast_to(cached_BS[:, None], (B, tree.nodes, S))
    nodes_BMM = jnp.broadcast_to(jnp.asarray(tree.ancestor_MM)[None], (B, tree.nodes, tree.nodes))
    return jnp.concatenate([cached_BMS, nodes_BMM], axis=-1)[:, None, None]


def _scores(q_BTHD: Array, k_BKSD: Array) -> Float[Array, "B K J T S"]:
    B, T, H, D = q_BTHD.shape
    K = k_BKSD.shape[1]
    return D**-0.5 * product("btkjd,bksd->bkjts", q_BTHD.reshape(B, T, K, H // K, D), k_BKSD)


def _merge_heads(y_BKJTE: Array, like_BTHD: Array) -> Float[Array, "B T H E"]:
    return y_BKJTE.astype(like_BTHD.dtype).transpose(0, 3, 1, 2, 4).reshape(*like_BTHD.shape[:3], -1)
