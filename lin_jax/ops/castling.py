"""Castling-ViT's sum of values and attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def castling_sum(v: Float[Array, "*axes E"], attended: Float[Array, "*axes E"]) -> Float[Array, "*axes E"]:
    """v / 2 + attention / pi, normalised over the value channels (You et al., 2023)."""
    mixed = v.astype(jnp.float32) / 2 + attended.astype(jnp.float32) / jnp.pi
    square = jnp.sum(jnp.square(mixed), axis=-1, keepdims=True)
    return (mixed * jax.lax.rsqrt(jnp.maximum(square, 1e-12))).astype(v.dtype)
