"""The next token from logits: what is changed about them, and the choice."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from lin_jax.ops.tree import Tree
from lin_jax.settings.generate import SamplingConfig


def adjust(
    logits_BMV: Float[Array, "B M V"], sampling: SamplingConfig, seen_BMV: Bool[Array, "B M V"] | None
) -> Float[Array, "B M V"]:
    """Logits of the distribution that is sampled from; -inf for tokens that are left out.

    Args:
        logits_BMV: the model's, float32.
        sampling: what to do to them.
        seen_BMV: tokens that occurred before; needed for a repetition penalty.
    """
    if sampling.repetition_penalty != 1 and seen_BMV is not None:
        penalty = sampling.repetition_penalty
        punished = jnp.where(logits_BMV > 0, logits_BMV / penalty, logits_BMV * penalty)
        logits_BMV = jnp.where(seen_BMV, punished, logits_BMV)
    if sampling.temperature == 0:
        return logits_BMV
    logits_BMV = logits_BMV / sampling.temperature
    if 0 < sampling.top_k < logits_BMV.shape[-1]:
        least = jax.lax.top_k(logits_BMV, sampling.top_k)[0][..., -1:]
        logits_BMV = jnp.where(logits_BMV < least, -jnp.inf, logits_BMV)
    if sampling.top_p < 1:
        logits_BMV = _keep_top_p(logits_BMV, sampling.top_p)
    if sampling.min_p > 0:
        p_BMV = jax.nn.softmax(logits_BMV, axis=-1)
        least = sampling.min_p * jnp.max(p_BMV, axis=-1, keepdims=True)
        logits_BMV = jnp.where(p_BMV < least, -jnp.inf, logits_BMV)
    return logits_BMV


def _keep_top_p(logits_BMV: Array, top_p: float) -> Array:
    """The fewest likeliest tokens whose probabilities reach `top_p`, and those as likely as the last of them."""
    p_BMV = jax.nn.softmax(logits_BMV, axis=-1)
    falling = -jnp.sort(-p_BMV, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(p_BMV < least, -jnp.inf, logits_BMV)


def sequence_keys(
    seed: Integer[Array, ""] | int, number_B: Int[Array, " B"], sample_B: Int[Array, " B"]
) -> Key[Array, " B"]:
    """Return a key for each sequence: of the seed and the numbers of its prompt and sample, whatever its batch."""
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), number_B)
    return jax.vmap(jax.random.fold_in)(key_B, sample_B)


def choose(
    logits_BMV: Float[Array, "B M V"],
    sampling: SamplingConfig,
    key_B: Key[Array, " B"],
    position_B: Int[Array, " B"],
    tree: Tree,
) -> Int[Array, "B M"]:
    """The token that follows each node: the likeliest, or a sample.

    The random numbers are those of the sequence and of the position of the chosen token. So speculation takes the very
    samples of plain decoding, and keeps its distribution: a guess is right if it is the token that is sampled anyway.

    Args:
        logits_BMV: from `adjust`.
        sampling: its temperature decides.
        key_B: from `sequence_keys`.
        position_B: of the token that follows the root.
        tree: the nodes.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BMV, axis=-1).astype(jnp.int32)
    V = logits_BMV.shape[-1]
    position_BP = position_B[:, None] + jnp.arange(tree.height, dtype=jnp.int32)[None]
    at = lambda key, position: jax.random.gumbel(jax.random.fold_in(key, position), (V,))  # noqa: E731
    noise_BPV = jax.vmap(jax.vmap(at, (None, 0)))(key_B, position_BP)
    return jnp.argmax(logits_BMV + noise_BPV[:, tree.depth_M], axis=-1).astype(jnp.int32)


def seen_at_nodes(seen_BV: Bool[Array, "B V"], tokens_BM: Int[Array, "B M"], tree: Tree) -> Bool[Array, "B M V"]:
    """The tokens that occurred before what follows each node: in the text, or on the node's path."""
    is_token_BMV = jax.nn.one_hot(tokens_BM, seen_BV.shape[1], dtype=jnp.float32)
    on_path_BMV = jnp.einsum("mn,bnv->bmv", jnp.asarray(tree.ancestor_MM, jnp.float32), is_token_BMV) > 0
    return seen_BV[:, None] | on_path_BMV
