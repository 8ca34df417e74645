"""Guesses of the tokens that follow: from the text itself, or from Medusa heads."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.ops.tree import Tree


def lookup(
    text_BX: Int[Array, "B X"],
    length_B: Int[Array, " B"],
    next_B: Int[Array, " B"],
    *,
    tokens: int,
    match: int,
) -> Int[Array, "B tokens"]:
    """What followed the last tokens of a text where they last occurred before (prompt lookup: Saxena, 2023).

    The place where most of the last tokens agree is taken, up to `match` of them, and of several the latest that some
    token follows. Where not even one agrees, or the text ends, the guesses are 0.

    Args:
        text_BX: the text; its first `length_B` tokens count.
        length_B: tokens of the text without `next_B`.
        next_B: the last token of the text, which is not in `text_BX` yet.
        tokens: guesses.
        match: most tokens that are compared.
    """
    X = text_BX.shape[1]
    index_X = jnp.arange(X, dtype=jnp.int32)
    agreeing_BX = jnp.zeros(text_BX.shape, jnp.int32)
    run_BX = jnp.ones(text_BX.shape, bool)
    for back in range(match):
        # The token `back` places before the last one, and before each place.
        own_B = next_B if back == 0 else jnp.take_along_axis(text_BX, jnp.maximum(length_B - back, 0)[:, None], 1)[:, 0]
        there_BX = jnp.pad(text_BX, ((0, 0), (back, 0)), constant_values=-1)[:, :X]
        run_BX &= (there_BX == own_B[:, None]) & (length_B >= back)[:, None]
        agreeing_BX += run_BX
    usable_BX = (index_X[None] + 1 < length_B[:, None]) & (agreeing_BX > 0)
    place_B = jnp.argmax(jnp.where(usable_BX, agreeing_BX * X + index_X[None], -1), axis=1)
    guess_BT = place_B[:, None] + 1 + jnp.arange(tokens, dtype=jnp.int32)[None]
    known_BT = (guess_BT < length_B[:, None]) & jnp.any(usable_BX, axis=1)[:, None]
    return jnp.where(known_BT, jnp.take_along_axis(text_BX, jnp.minimum(guess_BT, X - 1), axis=1), 0)


def from_heads(logits_BKV: Float[Array, "B heads V"], next_B: Int[Array, " B"], tree: Tree) -> Int[Array, "B M"]:
    """Tokens of all nodes: `next_B` at the root; a node of depth d and rank r is guess r of head d - 1.

    Args:
        logits_BKV: of Medusa heads, at least as many as the tree is deep.
        next_B: the token that follows the text.
        tree: the nodes.
    """
    _, best_BKr = jax.lax.top_k(logits_BKV, min(tree.widest_rank, logits_BKV.shape[-1]))
    nodes_BM = best_BKr[:, tree.depth_M[1:] - 1, jnp.asarray(tree.ranks[1:], jnp.int32)]
    return jnp.concatenate([next_B[:, None], nodes_BM.astype(jnp.int32)], axis=1)
