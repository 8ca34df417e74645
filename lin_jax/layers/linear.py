"""Affine maps of the last axis."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lin_jax.layers.parameter import parameter, uniform


class Linear(nnx.Module):
    """y = x kernel + bias, computed in the type of x."""

    def __init__(self, inputs: int, outputs: int, axes: tuple[str, str], *, rngs: nnx.Rngs):
        self.kernel = parameter(uniform(rngs.params(), (inputs, outputs), inputs), axes, decay=True)
        self.bias = parameter(uniform(rngs.params(), (outputs,), inputs), axes[1:])

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """Applies the map."""
        return jnp.matmul(x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype).reshape(
            (1,) * (x.ndim - 1) + (-1,)
        )
