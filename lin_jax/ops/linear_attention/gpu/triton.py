"""What depends on Pallas' Triton lowering, which JAX has deprecated since 0.11: all of it, so that it can be replaced.

A program of the grid loads and stores pieces of whole arrays, with masks; the compiler divides its work among warps.
Pallas' module is imported where a kernel is made, so that nothing else meets its deprecation.
"""

import importlib
from typing import Any

import jax
from jax.experimental import pallas as pl

from lin_jax.ops.linear_attention.gpu.blocks import GpuPlan


def _lowering() -> Any:
    return importlib.import_module("jax.experimental.pallas.triton")


def load(ref: Any, *, mask: Any = None, other: Any = None) -> Any:
    """Return a piece of an array, `other` where `mask` does not hold."""
    return _lowering().load(ref, mask=mask, other=other)


def store(ref: Any, x: Any, *, mask: Any = None) -> None:
    """Write x to a piece of an array where `mask` holds."""
    _lowering().store(ref, x, mask=mask)


def atomic_add(ref: Any, at: Any, x: Any) -> Any:
    """Add x to a piece of an array that other programs may add to."""
    return _lowering().atomic_add(ref, at, x)


def call(
    kernel: Any,
    plan: GpuPlan,
    grid: tuple[int, ...],
    arguments: Any,
    outputs: Any,
    aliases: dict[int, int] | None = None,
) -> Any:
    """Run `kernel(*references to arguments, references to outputs)` for every point of the grid.

    The platform that the program is compiled for decides whether the kernel is compiled or simulated.
    """
    parameters = _lowering().CompilerParams(num_warps=plan.tuning.warps, num_stages=plan.tuning.stages)

    def form(interpret: bool) -> Any:
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=(outputs,),
            input_output_aliases=aliases or {},
            interpret=interpret,
            compiler_params=parameters,
        )

    (written,) = jax.lax.platform_dependent(*arguments, cuda=form(False), default=form(True))
    return written
