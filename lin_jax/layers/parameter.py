"""Parameters that say how they are sharded, whether they decay, and what they are for."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

# Where a parameter is in its model.
Path = tuple[str, ...]
# What a parameter can be for; `finetune.train` names them. `new` are those that linearized attention adds; adapters are
# added to a model, and always train.
Role = Literal["new", "norm", "embedding", "attention", "feed_forward", "head", "adapter"]


def parameter(
    value: Array, axes: tuple[str | None, ...], decay: bool = False, roles: tuple[Role, ...] = ()
) -> nnx.Param:
    """Return a trainable parameter.

    Args:
        value: initial value, float32; also where it starts in a model that is converted to the attention that adds it.
        axes: a logical name an axis (see `lin_jax.train.sharding`), None for an axis that is never cut. Layers that are
            stacked have one more axis, in front.
        decay: whether weight decay applies: True for matrices, False for biases, norms, scales and filters.
        roles: what it is for.
    """
    return nnx.Param(value, axes=axes, decay=decay, roles=roles)


def parameters_by_path(model: Any) -> dict[str, Any]:
    """Return the arrays of all parameters, or what stands for them, by path joined by dots."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def roles_by_path(model: Any) -> dict[tuple[str, ...], tuple[Role, ...]]:
    """Return what every parameter is for, by path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {tuple(map(str, path)): variable.roles for path, variable in flat}


class Constant(nnx.Variable):
    """A value that belongs to the model but is not trained, such as a random projection."""


def constant(value: Array, axes: tuple[str | None, ...]) -> Constant:
    """Return a value that is not trained, which runs and conversions keep.

    Args:
        value: float32.
        axes: a logical name an axis, as for `parameter`.
    """
    return Constant(value, axes=axes)


def constants_by_path(model: Any) -> dict[str, Any]:
    """Return the arrays of all constants, or what stands for them, by path joined by dots."""
    flat = nnx.to_flat_state(nnx.state(model, Constant))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def uniform(key: Key[Array, ""], shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    """Return numbers that are uniform in (-b, b) with b = fan_in ** -0.5.

    It is PyTorch's default for linear and convolution layers, and so the released models' start.
    """
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
