"""The least time that augmented attention can take on chips that need not be here, counted by hand.

    python -m benchmarks.roofline            prints the tables of docs/kernels.md
    python -m benchmarks.roofline --compiled compares the counts of XLA's form with the compiler's, on this device

A chip needs at least the operations over its peak and the bytes over its bandwidth, whichever is longer. Operations are
those of matrix products, counted once for a multiplication and once for an addition; bytes are those of device memory.
What is counted:

- `least`: no implementation can do with less. Every input is read once and every output written once; of the scores
  only those that are seen.
- `pallas_tpu`, `pallas_gpu`: the kernels, with the block sizes of the chip; what a GPU reads again from its cache (the
  same rows for several value tiles) counts once.
- `xla`: every matrix product reads its operands from memory and writes its result there, with elementwise operations
  for nothing; backward computes it all once more, and two products for each.
- `flash`: causal softmax attention without a T x T array in memory, as cuDNN has it.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import aot
from benchmarks.common import print_table
from lin_jax.chips import Chip, chip_named
from lin_jax.ops.linear_attention import xla
from lin_jax.ops.linear_attention.arguments import AttentionArrays, AttentionOptions
from lin_jax.ops.linear_attention.gpu import blocks as gpu_plan
from lin_jax.ops.linear_attention.gpu.blocks import GpuPlan, padded
from lin_jax.ops.linear_attention.inputs import Inputs, make_inputs
from lin_jax.ops.linear_attention.tpu import blocks, cost
from lin_jax.ops.linear_attention.tpu.cost import Cost

TPUS, GPUS = ("v5e", "v5p", "v6e"), ("a100", "h100", "h200")


def best_time(count: Cost, chip: Chip) -> float:
    """Seconds that a chip needs at least."""
    return max(count.flops / chip.flops, count.bytes_accessed / chip.memory_bandwidth)


class Axes(NamedTuple):
    """Sizes of a call, see `lin_jax.axes`; `own` is whether the grouped branch has its own queries and keys."""

    B: int
    T: int
    H: int
    K: int
    D: int
    P: int
    E: int
    G: int
    R: int
    W: int
    own: bool
    itemsize: int


def axes_of(case: aot.Case) -> Axes:
    """The sizes of a case."""
    B, T, H, D = case.shapes["q_BTHD"].shape
    _, _, K, E = case.shapes["v_BTKE"].shape
    own = case.shapes.get("grouped_q_BTHP")
    taps = case.shapes.get("conv_WH")
    G, R = case.options["group_size"], case.options.get("local_groups", 1)
    itemsize = case.shapes["v_BTKE"].dtype.itemsize
    return Axes(
        B, T, H, K, D, D if own is None else own.shape[-1], E, G, R, 0 if taps is None else taps.shape[0],
        own is not None, itemsize,
    )  # fmt: skip


def token_bytes(a: Axes) -> tuple[int, int]:
    """Bytes of all queries, keys and values, and of the outputs."""
    width = a.D + a.own * a.P
    return a.B * a.T * a.itemsize * (a.H * width + a.K * (width + a.E)), a.B * a.T * a.itemsize * a.H * a.E


def least(a: Axes, direction: str) -> Cost:
    """What every implementation has to do."""
    inputs, outputs = token_bytes(a)
    # A query sees half of its own group and R - 1 whole ones; a tap is one product with a value.
    seen = (a.G + 1) / 2 + (a.R - 1) * a.G
    local, far, fold = seen * (a.D + a.E), a.P * a.E, a.P * a.E
    forward = 2 * a.B * a.T * (a.H * (local + far + a.W * a.E) + a.K * fold)
    if direction == "forward":
        return Cost(int(forward), 0, inputs + outputs)
    # Scores and states once more; then two products for every one of the forward pass.
    again = 2 * a.B * a.T * (a.H * seen * a.D + a.K * fold)
    return Cost(int(2 * forward + again), 0, 2 * inputs + outputs)


def flash_attention(a: Axes, direction: str) -> Cost:
    """Softmax attention to all earlier tokens; backward has five products where forward has two."""
    B, T, H, K, D, E, size = a.B, a.T, a.H, a.K, a.D, a.E, a.itemsize
    inputs, outputs = B * T * size * (H * D + K * (D + E)), B * T * size * H * E
    pairs = B * H * T * (T + 1) // 2
    if direction == "forward":
        return Cost(2 * pairs * (D + E), pairs, inputs + outputs)
    return Cost(2 * pairs * (3 * D + 2 * E), pairs, 2 * inputs + 2 * outputs)


class Product(NamedTuple):
    """A matrix product of XLA's form: operations, and bytes of its operands and result."""

    flops: float
    bytes: float


def xla_products(a: Axes) -> dict[str, Product]:
    """The products of XLA's form for an aligned row, forward, a token each."""
    G, S, size = a.G, min(a.G * a.R, a.T), a.itemsize
    state = a.P * a.E * 4 / G
    tail = max(0, a.W - 1 - (S - G))

    def product(contracted: int, columns: int, right: float) -> Product:
        """One row of the left operand, its share of the right one, one row of the result in float32; all heads."""
        return Product(2 * contracted * columns * a.H, a.H * (contracted * size + columns * 4) + right * size)

    found = {
        "scores": product(a.D, S, a.K * a.D * S / G),
        "values": product(S, a.E, a.K * a.E * S / G),
        "far": product(a.P, a.E, a.K * a.P * a.E / G),
        "sums": Product(2 * a.K * a.P * a.E, a.K * ((a.P + a.E) * size + state)),
        # The scan reads two states and writes one, for about two sums a group.
        "scan": Product(0, 2 * 3 * a.K * state),
    }
    if tail:
        found["tail"] = product(tail, a.E, a.K * a.E * tail / G)
    return found


def xla_form(a: Axes, direction: str) -> Cost:
    """XLA's form: see the head of this file."""
    products = xla_products(a).values()
    inputs, outputs = token_bytes(a)
    tokens = a.B * a.T
    flops = tokens * sum(p.flops for p in products)
    moved = tokens * sum(p.bytes for p in products) + outputs
    times = 1 if direction == "forward" else 3
    return Cost(int(times * flops), 0, int(times * moved + (0 if times == 1 else inputs)))


def tpu_kernel(inputs: Inputs, kind: str, direction: str) -> Cost:
    """The TPU kernel's own estimate, as its calls give it to the compiler."""
    plan = blocks.make_plan(inputs, kind, direction)
    if isinstance(plan, str):
        raise ValueError(plan)
    if direction == "forward":
        return cost.forward_cost(plan)
    return _sum([cost.query_cost(plan), cost.key_cost(plan)])


def _sum(counts: list[Cost]) -> Cost:
    return Cost(*(sum(column) for column in zip(*counts, strict=True)))


def gpu_kernel(inputs: Inputs, kind: str, direction: str) -> Cost:
    """The GPU kernels of a call."""
    plans = gpu_plan.make_plans(inputs, kind)
    if direction == "forward":
        return _sum([forward_kernel(plans.forward), sums_kernel(plans.forward, plans.forward.heads)])
    plan = plans.backward
    return _sum(
        [query_kernels(plan), sums_kernel(plan, plan.heads), key_kernels(plan), sums_kernel(plan, plan.key_heads)]
    )


class Pairs(NamedTuple):
    """Pairs of blocks that a kernel goes through for all blocks of a row and one head: with scores, and in all."""

    scored: int
    all: int


def pairs_of(plan: GpuPlan) -> Pairs:
    """Pairs of a block of queries and one of keys, as the loops of the kernels make them."""
    scored = total = 0
    for i in range(plan.blocks):
        if plan.lag is not None:
            offsets = range(plan.reach + 1)
            kinds = [plan.kinds(offset) for offset in offsets]
            scored += sum(kind.near != "none" or kind.far != "none" for kind in kinds)
            total += sum(kind.near != "none" or kind.far != "none" or kind.band for kind in kinds)
        else:
            a_group = plan.group_size // plan.rows
            lowest = max(0, (i // a_group - plan.local_groups + 1) * a_group)
            count = i + 1 - max(0, min(lowest, i - plan.band_lag))
            scored, total = scored + count, total + count
    return Pairs(scored, total)


def _scores(plan: GpuPlan) -> int:
    """Columns of the products that make a pair's weights."""
    form, D, P = plan.form, padded(plan.size), padded(plan.grouped_size)
    return D * form.scored + P * (form.grouped and not form.shared) * _far(plan)


def _far(plan: GpuPlan) -> bool:
    """Whether the grouped branch has products of pairs at all."""
    return plan.form.grouped and (plan.lag is None or any(plan.kinds(n).far != "none" for n in range(plan.reach + 1)))


def _token_bytes(plan: GpuPlan) -> tuple[int, int, int, int]:
    """Bytes of queries, keys, values and outputs."""
    tokens = plan.batch * plan.tokens * plan.itemsize
    width = plan.size + plan.form.own_grouped * plan.grouped_size
    heads, key_heads, E = plan.heads, plan.key_heads, plan.value_size
    return tokens * heads * width, tokens * key_heads * width, tokens * key_heads * E, tokens * heads * E


def forward_kernel(plan: GpuPlan) -> Cost:
    """The kernel of the forward pass; scores are computed for every value tile."""
    pairs, M, tile = pairs_of(plan), plan.rows, plan.tile
    a_pair = 2 * M * M
    flops = a_pair * (pairs.scored * _scores(plan) * (2 if plan.form.local == "softmax" else 1) + pairs.all * tile)
    flops += plan.blocks * plan.form.grouped * 2 * (2 * M * padded(plan.grouped_size) * tile)
    return Cost(plan.batch * plan.heads * plan.tiles * flops, 0, sum(_token_bytes(plan)))


def sums_kernel(plan: GpuPlan, heads: int) -> Cost:
    """The states where parts start: keys and values of all parts but one are read once more."""
    parts = plan.parts(heads) if plan.form.grouped else 1
    if parts == 1:
        return Cost(0, 0, 0)
    share = (parts - 1) / parts
    _, k, v, _ = _token_bytes(plan)
    state = 4 * plan.batch * plan.key_heads * plan.grouped_size * plan.value_size
    flops = 2 * plan.batch * plan.tokens * plan.key_heads * padded(plan.grouped_size) * plan.value_size
    return Cost(int(share * flops), 0, int(share * (k + v)) + 5 * (parts - 1) * state)


def query_kernels(plan: GpuPlan) -> Cost:
    """Gradients of queries, and of what all blocks share."""
    pairs, M, E = pairs_of(plan), plan.rows, plan.tiles * plan.tile
    D, P = padded(plan.size), padded(plan.grouped_size)
    pulled = D * plan.form.scored + P * _far(plan)
    softmax = plan.form.local == "softmax"  # Its denominator, and the sum over its gradient, come first.
    flops = 2 * M * M * (pairs.scored * ((1 + 2 * softmax) * _scores(plan) + softmax * E + pulled) + pairs.all * E)
    flops += plan.blocks * plan.form.grouped * 2 * (2 * M * P * E)
    q, k, v, y = _token_bytes(plan)
    return Cost(plan.batch * plan.heads * flops, 0, 2 * q + k + v + y + _partial_bytes(plan, plan.heads))


def key_kernels(plan: GpuPlan) -> Cost:
    """Gradients of keys and values."""
    pairs, M, E = pairs_of(plan), plan.rows, plan.tiles * plan.tile
    D, P = padded(plan.size), padded(plan.grouped_size)
    pulled = D * plan.form.scored + P * _far(plan)
    passes = 1 if plan.tiles == 1 else plan.tiles + 1  # Scores for every value tile, and for the keys.
    flops = 2 * M * M * (pairs.scored * (passes * _scores(plan) + pulled + E) + pairs.all * E)
    folds = plan.blocks * plan.form.grouped * 2 * M * P * E
    q, k, v, y = _token_bytes(plan)
    moved = q + 2 * (k + v) + y + _partial_bytes(plan, plan.key_heads)
    return Cost(plan.batch * (plan.heads * (flops + folds) + 2 * plan.key_heads * folds), 0, moved)


def _partial_bytes(plan: GpuPlan, heads: int) -> int:
    """Float32 terms of the grouped branch's gradients, one a value tile, written and read; and a second pass."""
    if plan.tiles == 1:
        return 0
    q, k, v, y = _token_bytes(plan)
    return 2 * 4 * plan.tiles * plan.batch * plan.tokens * heads * plan.grouped_size + q + k + v + y


COUNTS: dict[str, tuple[tuple[str, ...], Callable[[aot.Case, str, str], Cost]]] = {
    "least": (TPUS + GPUS, lambda case, kind, direction: least(axes_of(case), direction)),
    "xla": (TPUS + GPUS, lambda case, kind, direction: xla_form(axes_of(case), direction)),
    "pallas_tpu": (TPUS, lambda case, kind, direction: of_inputs(case, tpu_kernel, kind, direction)),
    "pallas_gpu": (GPUS, lambda case, kind, direction: of_inputs(case, gpu_kernel, kind, direction)),
    "flash": (GPUS, lambda case, kind, direction: flash_attention(axes_of(case), direction)),
}


def of_inputs(case: aot.Case, count: Callable[..., Cost], *arguments: Any) -> Cost:
    """`count(inputs, *arguments)` for the inputs that the op would make of a case; nothing is computed."""
    found = []

    def make(arrays: dict[str, Any]) -> Any:
        arrays = dict(arrays)
        named = {"alpha_H" if name == "alpha" else name: x for name, x in arrays.items()}
        ids, given = named.pop("segment_ids_BT", None), AttentionArrays(**named)
        inputs = make_inputs(given, AttentionOptions(**case.options), segment_ids_BT=ids)
        found.append(count(inputs, *arguments))
        return given.q_BTHD

    jax.eval_shape(make, case.shapes)
    return found[0]


def table(direction: str) -> list[list[str]]:
    """One row a shape and implementation: GFLOP, MB and FLOP a byte (on the first chip), and milliseconds a chip."""
    rows = []
    for name, make in aot.SHAPES.items():
        for implementation, (chips, count) in COUNTS.items():
            counts = {chip: count(make(), chip_named(chip).kind, direction) for chip in chips}
            first = counts[chips[0]]
            cells = [name, implementation, f"{first.flops / 1e9:.1f}", f"{first.bytes_accessed / 1e6:.0f}"]
            cells += [f"{first.flops / first.bytes_accessed:.0f}"]
            times = [_milliseconds(counts.get(chip), chip) for chip in TPUS + GPUS]
            rows.append(cells + times)
    return rows


def _milliseconds(count: Cost | None, chip: str) -> str:
    return "" if count is None else f"{1e3 * best_time(count, chip_named(chip)):.3f}"


HEADER = ["shape", "form", "GFLOP", "MB", "FLOP/byte", *(f"{chip} ms" for chip in TPUS + GPUS)]


def print_markdown(rows: list[list[str]]) -> None:
    """The rows as a table for the documentation."""
    for row in (HEADER, ["---"] * 2 + ["--:"] * (len(HEADER) - 2), *rows):
        print("| " + " | ".join(row) + " |")


def compiled_counts(case: aot.Case, direction: str) -> dict[str, float]:
    """What the compiler counts of XLA's form on this device. Of a loop it counts one turn: use one chunk of tokens."""
    function = lambda arrays: case.call(arrays, "xla")  # noqa: E731
    arrays = case.tokens()
    if direction == "forward":
        return jax.jit(function).lower(arrays).compile().cost_analysis()
    q, v = case.shapes["q_BTHD"], case.shapes["v_BTKE"]
    y = jax.ShapeDtypeStruct((*q.shape[:2], q.shape[2] * v.shape[3]), v.dtype)

    def backward(arrays: dict[str, Any], y: jax.Array) -> Any:
        return jax.vjp(function, arrays)[1](y)[0]

    return jax.jit(backward).lower(arrays, y).compile().cost_analysis()


def in_float32(case: aot.Case) -> aot.Case:
    """In float32: a CPU's compiler converts bfloat16 first, and counts the copies."""
    shapes = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in case.shapes.items()}
    return aot.Case(shapes, case.options)


def compare() -> None:
    """Prints the counts of XLA's form for one chunk in float32, by hand and by the compiler."""
    rows = []
    tokens = xla.CHUNK_TOKENS_CPU if jax.default_backend() == "cpu" else xla.CHUNK_TOKENS_ACCELERATOR
    for name, make in {"llama2_7b": aot.llama2_7b, "flash110m": aot.flash110m}.items():
        for direction in aot.DIRECTIONS:
            case = in_float32(make(tokens))
            by_hand, by_compiler = xla_form(axes_of(case), direction), compiled_counts(case, direction)
            flops, moved = by_compiler["flops"], by_compiler["bytes accessed"]
            cells = [f"{by_hand.flops / 1e9:.2f}", f"{flops / 1e9:.2f}", f"{by_hand.bytes_accessed / 1e6:.0f}"]
            rows.append([f"{name}-{tokens}", direction, *cells, f"{moved / 1e6:.0f}"])
    print_table(["shape", "pass", "GFLOP by hand", "compiler", "MB by hand", "compiler"], rows)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="compare with the compiler's counts instead")
    if parser.parse_args().compiled:
        print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
        return compare()
    for direction in aot.DIRECTIONS:
        print(f"\n{direction}\n")
        print_markdown(table(direction))


if __name__ == "__main__":
    main()
