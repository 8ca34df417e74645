"""Parameters that say how they are sharded and whether they decay."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key


def parameter(value: Array, axes: tuple[str | None, ...], decay: bool = False) -> nnx.Param:
    """A trainable parameter.

    Args:
        value: initial value, float32.
        axes: a logical name an axis (see `lin_jax.train.sharding`), None for an axis that is never cut. Layers that are
            stacked have one more axis, in front.
        decay: whether weight decay applies: True for matrices, False for biases, norms, scales and filters.
    """
    return nnx.Param(value, axes=axes, decay=decay)


def parameters_by_path(model: Any) -> dict[str, Any]:
    """The arrays of all parameters, or what stands for them, by path joined by dots."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


class Constant(nnx.Variable):
    """A value that belongs to the model but is not trained, such as a random projection."""


def uniform(key: Key[Array, ""], shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    """Uniform in (-b, b) with b = fan_in ** -0.5.

    It is PyTorch's default for linear and convolution layers, and so the released models' start.
    """
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
