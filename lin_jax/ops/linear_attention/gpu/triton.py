"""What depends on Pallas' Triton lowering, which JAX has deprecated since 0.11: all of it, so that it can be replaced.

A program of the grid loads and stores pieces of whole arrays, with masks; the compiler divides its work among warps.
"""

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lin_jax.ops.linear_attention.gpu.blocks import Plan

load = plgpu.load
store = plgpu.store
atomic_add = plgpu.atomic_add


def call(
    kernel: Any, plan: Plan, grid: tuple[int, ...], arguments: Any, outputs: Any, aliases: dict[int, int] | None = None
) -> Any:
    """`kernel(*references to arguments, references to outputs)` for every point of the grid.

    The platform that the program is compiled for decides whether the kernel is compiled or simulated.
    """

    def form(interpret: bool) -> Any:
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=(outputs,),
            input_output_aliases=aliases or {},
            interpret=interpret,
            compiler_params=plgpu.CompilerParams(num_warps=plan.tuning.warps, num_stages=plan.tuning.stages),
        )

    (written,) = jax.lax.platform_dependent(*arguments, cuda=form(False), default=form(True))
    return written
