"""Feature maps of the grouped branch: phi in y_t = phi(q_t) . sum over s of phi(k_s) v_s^T, as records in a table.

A map without arrays of its own is applied inside the blocks of each form, by name; kernels refuse one that they do not
know. A map with arrays (random projections, learned weights) is applied once to whole rows, before any form, and states
hold the keys that it gave.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lin_jax.ops.product import product

# Below this square of a norm a vector counts as zero.
SMALLEST_SQUARE = 1e-12


class MapArray(NamedTuple):
    """An array that a feature map needs besides its argument. Sizes are those of a head and of the features.

    Attributes:
        name: of the array.
        learned: whether it is a parameter; else a constant, which is saved with the model and never changes.
        shape: of the array, from the two sizes.
        draw: the array at its start, from a random key and the two sizes.
    """

    name: str
    learned: bool
    shape: Callable[[int, int], tuple[int, ...]]
    draw: Callable[[Array, int, int], Array]


class MapArrays(NamedTuple):
    """The arrays of a map in the order in which it declares them, for queries and for keys; they may be the same."""

    query: tuple[Array, ...]
    key: tuple[Array, ...]


NO_ARRAYS = MapArrays((), ())


@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """One feature map.

    Attributes:
        name: what options call it.
        apply: phi of [..., head size] and of its arrays.
        non_negative: whether all features are at least 0, as a denominator needs.
        gradient: of the argument, float32, from the argument and the float32 gradient of the result: what a kernel
            needs beside phi. None: no kernel can have it.
        arrays: what it needs besides.
        size: of the features, from those of a head and of the features that were asked for.
    """

    name: str
    apply: Callable[..., Array]
    non_negative: bool
    gradient: Callable[[Array, Array], Array] | None = None
    arrays: tuple[MapArray, ...] = ()
    size: Callable[[int, int], int] = lambda head_size, feature_size: head_size


def identity(x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
    """Return phi(x) = x."""
    return x


def identity_gradient(x: Array, gradient: Array) -> Array:
    """Return the gradient of x in `identity`."""
    return gradient


def _inverse_norm(x: Array) -> Array:
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return jax.lax.rsqrt(jnp.maximum(square, SMALLEST_SQUARE))


def unit(x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
    """Return phi(x) = x / ||x||, and 0 for the zero vector, with finite gradients there.

    The released LLaMA and GPT-2 code divides by the norm alone, which gives NaN for zero vectors.
    """
    return (x * _inverse_norm(x.astype(jnp.float32))).astype(x.dtype)


def unit_gradient(x: Array, gradient: Array) -> Array:
    """Return the gradient of x in `unit`. Below `SMALLEST_SQUARE` the norm counts as a constant."""
    wide = x.astype(jnp.float32)
    inverse = _inverse_norm(wide)
    y = wide * inverse
    along = jnp.where(inverse < SMALLEST_SQUARE**-0.5, jnp.sum(gradient * y, axis=-1, keepdims=True), 0.0)
    return inverse * (gradient - along * y)


def relu(x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
    """Return phi(x) = max(x, 0)."""
    return jax.nn.relu(x)


def relu_gradient(x: Array, gradient: Array) -> Array:
    """Return the gradient of x in `relu`."""
    return jnp.where(x.astype(jnp.float32) > 0, gradient, 0.0)


def elu1(x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
    """Return phi(x) = elu(x) + 1 (Katharopoulos et al., 2020)."""
    return jax.nn.elu(x) + 1


def elu1_gradient(x: Array, gradient: Array) -> Array:
    """Return the gradient of x in `elu1`."""
    wide = x.astype(jnp.float32)
    return jnp.where(wide > 0, gradient, gradient * jnp.exp(jnp.minimum(wide, 0.0)))


def favor(x: Float[Array, "*axes D"], projection_PD: Float[Array, "P D"]) -> Float[Array, "*axes P"]:
    """Return positive random features of the softmax kernel: E[phi(q) . phi(k)] = exp(q . k / sqrt(D)).

    phi(x)_i = exp(w_i . x' - ||x'||^2 / 2) / sqrt(P) with x' = x / D^(1/4) (Choromanski et al., 2021, FAVOR+).

    Args:
        x: queries or keys.
        projection_PD: rows w_i, from `orthogonal_projection`.
    """
    scaled = x * x.shape[-1] ** -0.25
    half_square = jnp.sum(jnp.square(scaled.astype(jnp.float32)), axis=-1, keepdims=True) / 2
    logits = product("...d,pd->...p", scaled, projection_PD) - half_square
    return (jnp.exp(logits) * projection_PD.shape[0] ** -0.5).astype(x.dtype)


def fourier(x: Float[Array, "*axes D"], projection: Float[Array, "half D"]) -> Float[Array, "*axes P"]:
    """Return random Fourier features of the Gaussian kernel: E[phi(q) . phi(k)] = exp(-||q - k||^2 / 2).

    phi(x) = [cos(W x), sin(W x)] / sqrt(P / 2), P twice the rows of W (Rahimi and Recht, 2007).
    """
    angle = product("...d,pd->...p", x, projection)
    features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return (features * projection.shape[0] ** -0.5).astype(x.dtype)


def orthogonal_projection(key: Key[Array, ""], features: int, head_size: int) -> Float[Array, "P D"]:
    """Return rows that are standard normal each, and orthogonal within every block of `head_size` rows.

    Orthogonal rows have a smaller variance than independent ones (Choromanski et al., 2021, section 3.3).
    """
    blocks = -(-features // head_size)
    key_direction, key_length = jax.random.split(key)
    direction = jax.random.orthogonal(key_direction, head_size, shape=(blocks,)).reshape(-1, head_size)[:features]
    length = jnp.linalg.norm(jax.random.normal(key_length, (features, head_size)), axis=-1, keepdims=True)
    return direction * length


def _features(head_size: int, feature_size: int) -> int:
    return feature_size


def _projection(features_per_row: int) -> MapArray:
    """Return the random projection of a map."""

    def shape(head_size: int, feature_size: int) -> tuple[int, ...]:
        return feature_size // features_per_row, head_size

    def draw(key: Array, head_size: int, feature_size: int) -> Array:
        return orthogonal_projection(key, *shape(head_size, feature_size))

    return MapArray("projection", False, shape, draw)


FEATURE_MAPS = {
    feature_map.name: feature_map
    for feature_map in (
        FeatureMap("identity", identity, False, identity_gradient),
        FeatureMap("unit", unit, False, unit_gradient),
        FeatureMap("relu", relu, True, relu_gradient),
        FeatureMap("elu1", elu1, True, elu1_gradient),
        FeatureMap("favor", favor, True, arrays=(_projection(1),), size=_features),
        FeatureMap("fourier", fourier, False, arrays=(_projection(2),), size=_features),
    )
}
