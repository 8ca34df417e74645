"""Times the GPU kernels with every combination of block sizes, and prints a row for `gpu/blocks.toml`.

    python -m benchmarks.tune_gpu_blocks [--tokens 32768] [--batch 8] [--rows 32 64 128]

Shapes as in `benchmarks.aot`, LLaMA-2-7B's and, for the wide passes, FLASH-110M's: one row of `--tokens` tokens, and
as many in `--batch` rows, which need no parts to fill the chip. The sizes of a pass are those with the least product of
both times. Combinations that the compiler refuses are left out.
"""

import argparse
import dataclasses
import itertools
import math
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import aot
from benchmarks.common import describe_machine, print_machine
from benchmarks.kernels import together
from lin_jax.ops.linear_attention.gpu import blocks as gpu_plan
from lin_jax.ops.linear_attention.gpu.blocks import Tuning

PASSES = ("forward", "forward_wide", "backward", "backward_wide")


def cases(name: str, tokens: int, batch: int) -> list[aot.Case]:
    """What a pass is timed on: one row of so many tokens, and as many in a batch of rows."""
    shape = aot.flash110m if name.endswith("_wide") else aot.llama2_7b
    return [shape(tokens), shape(tokens // batch, batch)]


def seconds(case: aot.Case, name: str, sizes: dict[str, int], repeats: int) -> float:
    """Least seconds of a pass with these sizes; infinite where they are refused."""
    tuning = gpu_plan.tuning

    def chosen(kind: str, each: str) -> Tuning:
        return dataclasses.replace(tuning(kind, each), **(sizes if each == name else {}))

    arrays = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(0), x.shape, x.dtype), case.shapes)

    def run(arrays: dict[str, Any]) -> Any:
        flat = {key: x.reshape(*x.shape[:2], -1) if x.ndim == 4 else x for key, x in arrays.items()}
        return case.call(flat, "pallas_gpu")

    def both(arrays: dict[str, Any]) -> Any:
        y, pull = jax.vjp(run, arrays)
        return pull(jnp.ones_like(y))

    program = jax.jit(both if name.startswith("backward") else run)
    try:
        with mock.patch.object(gpu_plan, "tuning", chosen):
            function, calls = together(lambda: program(arrays))
    except Exception as error:  # refused
        print(f"{name} {sizes}: {' '.join(str(error).split())[:100]}", flush=True)
        return math.inf
    return min(_time(function) for _ in range(repeats)) / calls


def _time(function: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def main() -> None:
    """Prints every time, and the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--value_tiles", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--warps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print_machine(describe_machine())
    lines = []
    for name in PASSES:
        found = {}
        for combination in itertools.product(options.rows, options.value_tiles, options.warps, options.stages):
            sizes = dict(zip(("rows", "value_tile", "warps", "stages"), combination, strict=True))
            shapes = cases(name, options.tokens, options.batch)
            times = [seconds(shape, name, sizes, options.repeats) for shape in shapes]
            found[combination] = math.prod(times)
            print(f"{name} {sizes}: {', '.join(f'{1e3 * t:.3f} ms' for t in times)}", flush=True)
        best = min(found, key=lambda combination: found[combination])
        pairs = zip(("rows", "value_tile", "warps", "stages"), best, strict=True)
        lines.append(f"{name} = {{{', '.join(f'{key} = {value}' for key, value in pairs)}}}")
    multiprocessors = getattr(jax.devices()[0], "core_count", "?")
    print("\n".join([f'\n["{jax.devices()[0].device_kind}"]', f"programs = {multiprocessors}", *lines]))


if __name__ == "__main__":
    main()
