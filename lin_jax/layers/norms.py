"""Normalisation of the last axis, in float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lin_jax.layers.parameter import parameter


class ScaleNorm(nnx.Module):
    """g x / max(||x|| / sqrt(C), 1e-5) with one scalar g (Nguyen and Salazar, 2019; the released FLASH)."""

    def __init__(self):
        self.scale = parameter(jnp.ones(()), (), roles=("norm",))

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """Normalises the last axis."""
        mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        # The floor is inside the root, where its gradient is finite for x = 0.
        inverse = jax.lax.rsqrt(jnp.maximum(mean_square, 1e-10))
        return (x * (inverse * self.scale[...])).astype(x.dtype)


class RMSNorm(nnx.Module):
    """w x / sqrt(mean(x^2) + epsilon) (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, epsilon: float):
        self.epsilon = epsilon
        self.weight = parameter(jnp.ones(width), ("width",), roles=("norm",))

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """Normalises the last axis."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        weight = self.weight.reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * weight).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation with weight and bias."""

    def __init__(self, width: int, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.weight = parameter(jnp.ones(width), ("width",), roles=("norm",))
        self.bias = parameter(jnp.zeros(width), ("width",), roles=("norm",))

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """Normalises the last axis."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        along_last = lambda p: p.reshape((1,) * (x.ndim - 1) + (-1,))  # noqa: E731
        normal = centred * jax.lax.rsqrt(variance + self.epsilon)
        return (normal * along_last(self.weight[...]) + along_last(self.bias[...])).astype(x.dtype)


NORMS: dict[str, Callable[[int], Any]] = {"scalenorm": lambda width: ScaleNorm(), "layernorm": LayerNorm}
