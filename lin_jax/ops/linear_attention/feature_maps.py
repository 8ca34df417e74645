"""Feature maps of the grouped branch: phi in y_t = phi(q_t) . sum over s of phi(k_s) v_s^T.

The maps in `FEATURE_MAPS` have no parameters and keep the width; `augmented_attention` applies them by name. The
random maps widen the features and need a projection: a layer applies them and passes the result as the grouped branch's
own queries and keys.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def identity(x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
    """phi(x) = x."""
    return x


def unit(x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
    """phi(x) = x / ||x||, and 0 for the zero vector, with finite gradients there.

    The released LLaMA and GPT-2 code divides by the norm alone, which gives NaN for zero vectors.
    """
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))).astype(x.dtype)


def relu(x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
    """phi(x) = max(x, 0)."""
    return jax.nn.relu(x)


def elu1(x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
    """phi(x) = elu(x) + 1 (Katharopoulos et al., 2020)."""
    return jax.nn.elu(x) + 1


FEATURE_MAPS: dict[str, Callable[[Array], Array]] = {"identity": identity, "unit": unit, "relu": relu, "elu1": elu1}


def favor(x: Float[Array, "*axes D"], projection_PD: Float[Array, "P D"]) -> Float[Array, "*axes P"]:
    """Positive random features of the softmax kernel: E[phi(q) . phi(k)] = exp(q . k / sqrt(D)).

    phi(x)_i = exp(w_i . x' - ||x'||^2 / 2) / sqrt(P) with x' = x / D^(1/4) (Choromanski et al., 2021, FAVOR+).

    Args:
        x: queries or keys.
        projection_PD: rows w_i, from `orthogonal_projection`.
    """
    scaled = x * x.shape[-1] ** -0.25
    half_square = jnp.sum(jnp.square(scaled.astype(jnp.float32)), axis=-1, keepdims=True) / 2
    logits = jnp.einsum("...d,pd->...p", scaled, projection_PD, preferred_element_type=jnp.float32) - half_square
    return (jnp.exp(logits) * projection_PD.shape[0] ** -0.5).astype(x.dtype)


def fourier(x: Float[Array, "*axes D"], projection: Float[Array, "half D"]) -> Float[Array, "*axes P"]:
    """Random Fourier features of the Gaussian kernel: E[phi(q) . phi(k)] = exp(-||q - k||^2 / 2).

    phi(x) = [cos(W x), sin(W x)] / sqrt(P / 2), P twice the rows of W (Rahimi and Recht, 2007).
    """
    angle = jnp.einsum("...d,pd->...p", x, projection, preferred_element_type=jnp.float32)
    features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return (features * projection.shape[0] ** -0.5).astype(x.dtype)


def orthogonal_projection(key: Key[Array, ""], features: int, head_size: int) -> Float[Array, "P D"]:
    """Rows that are standard normal each, and orthogonal within every block of `head_size` rows.

    Orthogonal rows have a smaller variance than independent ones (Choromanski et al., 2021, section 3.3).
    """
    blocks = -(-features // head_size)
    key_direction, key_length = jax.random.split(key)
    direction = jax.random.orthogonal(key_direction, head_size, shape=(blocks,)).reshape(-1, head_size)[:features]
    length = jnp.linalg.norm(jax.random.normal(key_length, (features, head_size)), axis=-1, keepdims=True)
    return direction * length
