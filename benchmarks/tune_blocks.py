"""Tries block sizes of the TPU kernel on the device at hand, and prints an entry of `blocks.toml` for it.

python -m benchmarks.tune_blocks
python -m benchmarks.tune_blocks --shapes tiny --rows 8 16 --heads 1 2 --repeats 2   # simulated, on a CPU

Every combination of `--rows` and `--heads` that fits is timed side by side with the others. On a CPU the kernel is
simulated, so that its times say nothing about a TPU.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.aot import DIRECTIONS, Case, flash110m, llama2_7b, make
from benchmarks.common import describe_machine, print_machine, time_interleaved
from lin_jax.ops.linear_attention.tpu.blocks import table

# A shape for each range of value sizes in the table: its largest value size, and the case.
SHAPES: dict[str, tuple[int, Callable[[], Case]]] = {
    "llama2_7b": (256, lambda: llama2_7b(8192)),
    "flash110m": (4096, lambda: flash110m(8192)),
    "tiny": (4096, lambda: make(1, 48, 2, 2, 8, 8, taps=4, local="relu2", group_size=4)),
}


def arrays_of(case: Case) -> dict[str, jax.Array]:
    """Normal entries."""
    random = np.random.default_rng(0)
    return {name: jnp.asarray(random.standard_normal(x.shape), x.dtype) for name, x in case.tokens().items()}


def candidate(case: Case, arrays: dict[str, jax.Array], direction: str, rows: int, heads: int) -> Callable[[], Any]:
    """A compiled call with these block sizes; `blocks.table` is read while it is traced."""
    kind = jax.devices()[0].device_kind
    entry = table().setdefault(kind, dict(table()["default"]))
    before = dict(entry)
    entry |= dict.fromkeys(DIRECTIONS, [{"value_size": 1 << 20, "rows": rows, "heads": heads}])
    try:

        def forward(arrays):
            return case.call(arrays, "pallas_tpu")

        def gradients(arrays):
            return jax.grad(lambda arrays: jnp.sum(forward(arrays).astype(jnp.float32)))(arrays)

        compiled = jax.jit(forward if direction == "forward" else gradients).lower(arrays).compile()
    finally:
        entry |= before
    return functools.partial(compiled, arrays)


def best(case: Case, direction: str, options: argparse.Namespace) -> tuple[int, int]:
    """Rows and heads of the fastest combination."""
    arrays, calls = arrays_of(case), {}
    for rows, heads in itertools.product(options.rows, options.heads):
        try:
            calls[f"{rows} rows, {heads} heads"] = candidate(case, arrays, direction, rows, heads)
        except Exception as error:  # what does not fit is left out
            print(f"  {rows} rows, {heads} heads: {str(error).splitlines()[0][:120]}")
    timings = time_interleaved(calls, options.repeats)
    for name, timing in sorted(timings.items(), key=lambda item: item[1].median):
        print(f"  {name}: median {1e3 * timing.median:.3f} ms, least {1e3 * timing.minimum:.3f} ms", flush=True)
    first = min(timings, key=lambda name: timings[name].median)
    rows, _, heads, _ = first.split()
    return int(rows), int(heads)


def main() -> None:
    """Tunes, and prints the entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama2_7b", "flash110m"])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    print_machine(describe_machine())
    kind = jax.devices()[0].device_kind
    found: dict[str, list[str]] = {direction: [] for direction in DIRECTIONS}
    for name in options.shapes:
        value_size, case = SHAPES[name]
        for direction in DIRECTIONS:
            print(f"{name}, {direction}")
            rows, heads = best(case(), direction, options)
            found[direction].append(f"{{ value_size = {value_size}, rows = {rows}, heads = {heads} }}")
    memory = table().get(kind, table()["default"])["vmem_mib"]
    lines = [f'["{kind}"]', f"vmem_mib = {memory}", *(f"{d} = [{', '.join(found[d])}]" for d in DIRECTIONS)]
    print("\n".join([*lines, "tuned = true"]))


if __name__ == "__main__":
    main()
