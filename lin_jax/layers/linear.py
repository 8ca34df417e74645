"""Affine maps of the last axis."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lin_jax.layers.parameter import parameter, uniform


class Linear(nnx.Module):
    """y = x kernel + bias, computed in the type of x; an adapter may add to it, see `lin_jax.layers.lora`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None],
        *,
        bias: bool = True,
        deviation: float | None = None,
        rngs: nnx.Rngs,
    ):
        """`deviation` starts the kernel from a normal distribution and the bias from 0; None is PyTorch's start."""
        if deviation is None:
            kernel = uniform(rngs.params(), (inputs, outputs), inputs)
            start = uniform(rngs.params(), (outputs,), inputs) if bias else None
        else:
            kernel = deviation * jax.random.normal(rngs.params(), (inputs, outputs))
            start = jnp.zeros(outputs) if bias else None
        self.kernel = parameter(kernel, axes, decay=True)
        self.bias = None if start is None else parameter(start, axes[1:])
        self.adapter: nnx.Module | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """Applies the map."""
        y = jnp.matmul(x, self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return y if self.adapter is None else y + self.adapter(x)
