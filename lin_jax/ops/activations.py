"""Activations of the local branch, a(q, k) as a function of the score."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def relu2(score: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """max(score, 0)^2 (Hua et al., 2022; all released models)."""
    return jnp.square(jax.nn.relu(score))


def laplace(score: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """0.5 (1 + erf((score - sqrt(1/2)) / (sqrt(1/(4 pi)) sqrt 2))) (Ma et al., 2022, section 3.3)."""
    mean, deviation = 0.5**0.5, (4 * jnp.pi) ** -0.5
    return 0.5 * (1 + jax.lax.erf((score - mean) / (deviation * 2**0.5)))


def masked_softmax(score: Float[Array, "*axes S"], mask: Bool[Array, "*masks S"]) -> Float[Array, "*axes S"]:
    """Softmax over the last axis where `mask` holds; all 0 where it holds nowhere, without NaN in gradients."""
    lowest = jnp.finfo(score.dtype).min
    masked = jnp.where(mask, score, lowest)
    top = jax.lax.stop_gradient(jnp.max(masked, axis=-1, keepdims=True))
    weight = jnp.where(mask, jnp.exp(masked - top), 0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1)


def masked_activation(
    local: str, score: Float[Array, "*axes S"], mask: Bool[Array, "*masks S"]
) -> Float[Array, "*axes S"]:
    """The weights a(q, k) of the local branch: `local` is relu2, laplace or softmax; 0 where `mask` does not hold."""
    if local == "softmax":
        return masked_softmax(score, mask)
    return jnp.where(mask, {"relu2": relu2, "laplace": laplace}[local](score), 0)
