"""Which draft tokens are kept: the deepest node on whose path every token is accepted."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lin_jax.ops.tree import Tree


def accept_exact(tree: Tree, tokens_BM: Int[Array, "B M"], choice_BM: Int[Array, "B M"]) -> Int[Array, " B"]:
    """The deepest node that plain decoding would have reached: each token is the choice that follows its parent.

    Args:
        tree: the nodes.
        tokens_BM: their tokens; the root's is always accepted.
        choice_BM: the token that follows each node.
    """
    right_BM = tokens_BM == _of_parents(tree, choice_BM)
    return _deepest(tree, right_BM, jnp.zeros(tokens_BM.shape))


def accept_typical(
    tree: Tree,
    tokens_BM: Int[Array, "B M"],
    logits_BMV: Float[Array, "B M V"],
    *,
    threshold: float,
    alpha: float,
) -> Int[Array, " B"]:
    """Medusa's typical acceptance (Cai et al., 2024): keep a token with p > min(threshold, alpha exp(-entropy)).

    p and the entropy are those of what follows the token's parent. Of the deepest nodes, the likeliest path is taken.

    Args:
        tree: the nodes.
        tokens_BM: their tokens; the root's is always accepted.
        logits_BMV: of what follows each node, temperature applied.
        threshold: the probability that always suffices.
        alpha: how much of exp(-entropy) suffices too.
    """
    p_BMV = jax.nn.softmax(logits_BMV, axis=-1)
    # The constant is the official code's.
    entropy_BM = -jnp.sum(p_BMV * jnp.log(p_BMV + 1e-5), axis=-1)
    least_BM = jnp.minimum(threshold, alpha * jnp.exp(-entropy_BM))
    parents = jnp.maximum(jnp.asarray(tree.parents), 0)
    p_BM = jnp.take_along_axis(p_BMV[:, parents], tokens_BM[:, :, None], axis=-1)[..., 0]
    log_p_BM = jnp.log(jnp.maximum(p_BM, 1e-37)).at[:, 0].set(0)
    along_path_BM = log_p_BM @ jnp.asarray(tree.ancestor_MM, jnp.float32).T
    return _deepest(tree, p_BM > _of_parents(tree, least_BM), along_path_BM)


def _of_parents(tree: Tree, x_BM: Array) -> Array:
    """For each node the entry of its parent; for the root its own, which is not looked at."""
    return x_BM[:, jnp.maximum(jnp.asarray(tree.parents), 0)]


def _deepest(tree: Tree, accepted_BM: Bool[Array, "B M"], score_BM: Float[Array, "B M"]) -> Int[Array, " B"]:
    """Of the nodes all of whose path is accepted the deepest, and of those the one with the highest score."""
    accepted_BM = accepted_BM.at[:, 0].set(True)
    reached_BM = jnp.all(accepted_BM[:, None] | ~jnp.asarray(tree.ancestor_MM)[None], axis=-1)
    depth_BM = jnp.where(reached_BM, jnp.asarray(tree.depth_M)[None], -1)
    deepest_BM = depth_BM == jnp.max(depth_BM, axis=-1, keepdims=True)
    return jnp.argmax(jnp.where(deepest_BM, score_BM, -jnp.inf), axis=-1).astype(jnp.int32)
