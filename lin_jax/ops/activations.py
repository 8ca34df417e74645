"""Activations of the local branch, a(q, k) as a function of the score: a table of records, `ACTIVATIONS`."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        name: what options call it.
        weights: a(q, k) from the scores [..., S] and a mask [..., S]; 0 where the mask does not hold.
        of_unit_vectors: whether `AttentionOptions.normalise` divides the queries and keys that it scores by their norm.
    """

    name: str
    weights: Callable[[Array, Array], Array]
    of_unit_vectors: bool = True


def relu2(score: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Return max(score, 0)^2 (Hua et al., 2022; all released models)."""
    return jnp.square(jax.nn.relu(score))


def laplace(score: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Return 0.5 (1 + erf((score - sqrt(1/2)) / (sqrt(1/(4 pi)) sqrt 2))) (Ma et al., 2022, section 3.3)."""
    mean, deviation = 0.5**0.5, (4 * jnp.pi) ** -0.5
    return 0.5 * (1 + jax.lax.erf((score - mean) / (deviation * 2**0.5)))


def masked_relu2(score: Float[Array, "*axes S"], mask: Bool[Array, "*masks S"]) -> Float[Array, "*axes S"]:
    """Return `relu2` where `mask` holds, else 0."""
    return jnp.where(mask, relu2(score), 0)


def masked_laplace(score: Float[Array, "*axes S"], mask: Bool[Array, "*masks S"]) -> Float[Array, "*axes S"]:
    """Return `laplace` where `mask` holds, else 0."""
    return jnp.where(mask, laplace(score), 0)


def masked_softmax(score: Float[Array, "*axes S"], mask: Bool[Array, "*masks S"]) -> Float[Array, "*axes S"]:
    """Return softmax over the last axis where `mask` holds; 0 where it holds nowhere, without NaN in gradients."""
    lowest = jnp.finfo(score.dtype).min
    masked = jnp.where(mask, score, lowest)
    top = jax.lax.stop_gradient(jnp.max(masked, axis=-1, keepdims=True))
    weight = jnp.where(mask, jnp.exp(masked - top), 0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1)


ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("relu2", masked_relu2),
        Activation("laplace", masked_laplace),
        Activation("softmax", masked_softmax, of_unit_vectors=False),
    )
}
