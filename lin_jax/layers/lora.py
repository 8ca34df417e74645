"""Low-rank adapters (Hu et al., 2021): y = x W + (alpha / rank) (x A) B; W is frozen, A starts random and B as 0."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lin_jax.layers.linear import Linear
from lin_jax.layers.parameter import parameter, uniform
from lin_jax.settings.base import require
from lin_jax.settings.finetune import LoraConfig


class Adapter(nnx.Module):
    """What is added to a `Linear`, which may be stacked along leading axes."""

    def __init__(self, linear: Linear, config: LoraConfig, *, rngs: nnx.Rngs):
        *stack, inputs, outputs = linear.kernel.get_value().shape
        axes = linear.kernel.axes
        self.scale = config.alpha / config.rank
        start = uniform(rngs.params(), (*stack, inputs, config.rank), inputs)
        self.a = parameter(start, (axes[0], None), decay=True, roles=("adapter",))
        self.b = parameter(jnp.zeros((*stack, config.rank, outputs)), (None, axes[1]), decay=True, roles=("adapter",))

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """What it adds to the output, without making the matrix."""
        low = jnp.matmul(x, self.a[...].astype(x.dtype))
        return self.scale * jnp.matmul(low, self.b[...].astype(x.dtype))

    def matrix(self) -> Float[Array, "*stack inputs outputs"]:
        """What it adds to the kernel, float32."""
        a, b = self.a[...].astype(jnp.float32), self.b[...].astype(jnp.float32)
        return self.scale * jnp.matmul(a, b, precision="highest")


def add_lora(model: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Give the projections that `config` names an adapter each; `model` is changed in place.

    Raises:
        ConfigError: a name that no projection of the model has.
    """
    if not config.rank:
        return
    linears = list(_linears(model))
    names = sorted({path[-1] for path, _ in linears})
    for target in config.targets:
        require(target in names, f"finetune.lora.targets: no projection {target}; there are {', '.join(names)}")
    for path, linear in linears:
        if path[-1] in config.targets:
            linear.adapter = Adapter(linear, config, rngs=rngs)


def merge_lora(model: nnx.Module) -> None:
    """Put every adapter of `model` into its kernel, which is float32 then; the model computes the same without."""
    for _, linear in _linears(model):
        if linear.adapter is not None:
            linear.kernel.set_value(linear.kernel[...].astype(jnp.float32) + linear.adapter.matrix())
            linear.adapter = None


def unmerge_lora(model: nnx.Module, adapted: nnx.Module) -> None:
    """Take the adapters of `adapted` out of the kernels of `model` and put them beside: undoes `merge_lora`.

    Args:
        model: merged; changed in place.
        adapted: a model with the adapters that were merged.
    """
    adapters = {path: linear.adapter for path, linear in _linears(adapted)}
    for path, linear in _linears(model):
        adapter = adapters[path]
        if adapter is not None:
            linear.kernel.set_value(linear.kernel[...].astype(jnp.float32) - adapter.matrix())
            linear.adapter = adapter


def _linears(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], Linear]]:
    """All projections by path."""
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, Linear):
            yield path, module
