"""Affine maps of the last axis."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lin_jax.layers.parameter import Role, parameter, uniform
from lin_jax.layers.partition import Partition


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
        roles: tuple[Role, ...] = (),
        rngs: nnx.Rngs,
    ):
        """Make the map with new numbers.

        Args:
            inputs: size of the last axis.
            outputs: size that it becomes.
            axes: logical names of both.
            bias: whether there is one.
            deviation: of the normal distribution from which the kernel starts, the bias then from 0; None is PyTorch's
                start.
            roles: what the parameters are for.
            rngs: random numbers.
        """
        if deviation is None:
            kernel = uniform(rngs.params(), (inputs, outputs), inputs)
            start = uniform(rngs.params(), (outputs,), inputs) if bias else None
        else:
            kernel = deviation * jax.random.normal(rngs.params(), (inputs, outputs))
            start = jnp.zeros(outputs) if bias else None
        self.kernel = parameter(kernel, axes, decay=True, roles=roles)
        self.bias = None if start is None else parameter(start, axes[1:], roles=roles)
        self.adapter: nnx.Module | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """Applies the map."""
        y = _affine(x, self.kernel[...], None if self.bias is None else self.bias[...])
        return y if self.adapter is None else y + self.adapter(x)

    def parts(
        self, x: Float[Array, "*batch inputs"], count: int, partition: Partition
    ) -> Sequence[Float[Array, "*batch part"]]:
        """The map, its output cut in equal parts along the last axis.

        Where a mesh cuts outputs, the matrix is split and each part cut anew, and not the output, which is larger.
        """
        if partition.shards(self.kernel.axes[-1]) == 1:
            return jnp.split(self(x), count, axis=-1)
        kernels = self._split(self.kernel, count, partition)
        biases = [None] * count if self.bias is None else self._split(self.bias, count, partition)
        y = [_affine(x, kernel, bias) for kernel, bias in zip(kernels, biases, strict=True)]
        if self.adapter is None:
            return y
        return [a + b for a, b in zip(y, jnp.split(self.adapter(x), count, axis=-1), strict=True)]

    @staticmethod
    def _split(matrix: nnx.Param, count: int, partition: Partition) -> list[Array]:
        """Equal parts of the outputs, each cut as the whole was."""
        return [partition.gather(part, matrix.axes) for part in jnp.split(matrix[...], count, axis=-1)]


def _affine(x: Array, kernel: Array, bias: Array | None) -> Array:
    y = jnp.matmul(x, kernel.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
