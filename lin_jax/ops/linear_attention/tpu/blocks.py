"""How a TPU kernel cuts its work: block sizes from `blocks.toml`, made legal and made to fit into vector memory."""

import dataclasses
import functools
import importlib.resources
import math
import tomllib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from lin_jax.ops.linear_attention.chunk import Form, form_of
from lin_jax.ops.linear_attention.inputs import Inputs
from lin_jax.ops.linear_attention.tpu.window_layout import FIELDS, window_back

LANES = 128
# Every head of a step is written out in the kernel's program.
MOST_HEADS = 32
# What a kernel may use by default.
LEAST_VMEM = 16 << 20
# What the compiler may need beside the buffers counted here, as a part of the memory.
HEADROOM = 0.15


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Axes of the op's inputs by their letters, see `lin_jax.axes`; P is 0 where D serves both branches."""

    B: int
    T: int
    H: int
    K: int
    D: int
    E: int
    P: int
    itemsize: int

    @property
    def J(self) -> int:  # noqa: N802
        """Query heads that share a key/value head."""
        return self.H // self.K

    @property
    def state_rows(self) -> int:
        """Rows of the state, P of the axis legend."""
        return self.P or self.D


@dataclasses.dataclass(frozen=True)
class TpuPlan:
    """Everything static about one pass of the kernel.

    Attributes:
        form: options of a block.
        sizes: axes.
        group_size, local_groups: G and R.
        bias, taps: whether there are such bands.
        aligned: whether groups are counted from the row's first token, so that masks need no fields.
        fresh: whether nothing goes before the row.
        final: whether the final state is asked for.
        rows: tokens in a block.
        back: tokens of the window before it; a divisor or a multiple of `rows`.
        heads: key/value heads in a step.
        vmem_bytes: vector memory that a step may use.
    """

    form: Form
    sizes: Sizes
    group_size: int
    local_groups: int
    bias: bool
    taps: bool
    aligned: bool
    fresh: bool
    final: bool
    rows: int
    back: int
    heads: int
    vmem_bytes: int

    @property
    def slots(self) -> int:
        """Tokens in a window."""
        return self.back + self.rows

    @property
    def period(self) -> int:
        """Differences of slot and query, and as many more as whole tiles of lanes take."""
        return -(-(self.slots + self.rows) // LANES) * LANES

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return -(-self.sizes.T // self.rows)

    @property
    def ragged(self) -> bool:
        """Whether the last block is not full."""
        return self.sizes.T % self.rows != 0

    @property
    def piece(self) -> int:
        """Tokens in a piece of the window before the block: pieces lie on a grid of their own size."""
        return min(self.back, self.rows)

    @property
    def pieces(self) -> int:
        """Pieces of the window before the block."""
        return self.back // self.piece if self.back else 0


@functools.cache
def table() -> dict[str, Any]:
    """The entries of `blocks.toml`."""
    return tomllib.loads(importlib.resources.files(__package__).joinpath("blocks.toml").read_text(encoding="utf-8"))


def sizes_of(inputs: Inputs) -> Sizes:
    """The axes of the inputs."""
    B, T, H, D = inputs.arrays.q_BTHD.shape
    own = inputs.arrays.grouped_q_BTHP
    P = own.shape[-1] if inputs.options.grouped and own is not None else 0
    itemsize = jnp.dtype(inputs.arrays.v_BTKE.dtype).itemsize
    return Sizes(B, T, H, inputs.arrays.k_BTKD.shape[2], D, inputs.arrays.v_BTKE.shape[-1], P, itemsize)


def make_plan(inputs: Inputs, device_kind: str, direction: str) -> TpuPlan | str:
    """The plan of a pass, or the reason why there is none.

    Args:
        inputs: of the op.
        device_kind: as JAX names it.
        direction: forward or backward, as in the table.
    """
    entry = table().get(device_kind, table()["default"])
    sizes, simulated = sizes_of(inputs), device_kind == "cpu"
    wanted = next((e for e in entry[direction] if e["value_size"] >= sizes.E), entry[direction][-1])
    vmem = entry["vmem_mib"] << 20
    least = None
    for rows in _rows(wanted["rows"], sizes.T, simulated):
        for heads in _heads(wanted["heads"], sizes, simulated):
            plan = _plan(inputs, sizes, rows, heads, vmem)
            needed = vmem_needed(plan, direction)
            if needed <= (1 - HEADROOM) * vmem:
                # No more than it may need: the compiler keeps arrays of the rest of the program in what is left.
                return dataclasses.replace(plan, vmem_bytes=min(vmem, max(2 * needed, LEAST_VMEM)))
            least = needed if least is None else min(least, needed)
    if least is None:
        return (
            f"{sizes.K} key/value heads of sizes {sizes.D} and {sizes.E} cannot be cut in blocks of {LANES} lanes with "
            f"at most {MOST_HEADS} query heads"
        )
    return f"{direction} needs {least / 2**20:.1f} MiB of vector memory, of {vmem / 2**20:.0f} that {device_kind} has"


def _plan(inputs: Inputs, sizes: Sizes, rows: int, heads: int, vmem: int) -> TpuPlan:
    final = inputs.return_state and inputs.options.grouped
    aligned = inputs.aligned and inputs.fresh and not final
    back = window_back(inputs, rows, aligned)
    return TpuPlan(
        form=form_of(inputs),
        sizes=sizes,
        group_size=inputs.options.group_size,
        local_groups=inputs.options.local_groups,
        bias=inputs.arrays.bias_XH is not None and inputs.options.scored,
        taps=inputs.arrays.conv_WH is not None,
        aligned=aligned,
        fresh=inputs.fresh,
        final=final,
        rows=rows,
        back=_round_back(back, rows),
        heads=heads,
        vmem_bytes=vmem,
    )


def _tile(rows: int) -> int:
    """Rows that a value in vector memory is cut in: a multiple suits types of 16 and 32 bits."""
    return math.gcd(rows, 16)


def _round_back(back: int, rows: int) -> int:
    """The least divisor or multiple of `rows` that is at least `back`, in whole tiles."""
    if back == 0 or back > rows:
        return -(-back // rows) * rows
    tile = _tile(rows)
    return next(n for n in range(tile, rows + 1, tile) if rows % n == 0 and n >= back)


def _rows(wanted: int, T: int, simulated: bool) -> Iterator[int]:
    """Block lengths to try, longest first; none much longer than the row."""
    rows = min(wanted, -(-T // 16) * 16)
    yield rows
    while rows > 32 and rows % 32 == 0 and not simulated:
        rows //= 2
        yield rows


def _heads(wanted: int, sizes: Sizes, simulated: bool) -> Iterator[int]:
    """Head counts to try, most first. A block's lanes must be whole tiles, or all there are."""
    widths = [sizes.J * sizes.D, sizes.D, sizes.E, sizes.J * sizes.E]
    widths += [sizes.P, sizes.J * sizes.P] if sizes.P else []
    legal = [
        n
        for n in range(1, sizes.K + 1)
        if sizes.K % n == 0
        and n * sizes.J <= MOST_HEADS
        and (simulated or n == sizes.K or all(n * width % LANES == 0 for width in widths))
    ]
    fitting = [n for n in legal if n <= wanted]
    yield from reversed(fitting or legal[:1])


def vmem_needed(plan: TpuPlan, direction: str) -> int:
    """Bytes of vector memory of one step: blocks that come and go are there twice, what is kept between steps once."""
    return _blocks_bytes(plan, direction) + _kept_bytes(plan, direction)


def _padded(rows: int, lanes: int, itemsize: int) -> int:
    return -(-rows // 8) * 8 * -(-lanes // LANES) * LANES * itemsize


def _blocks_bytes(plan: TpuPlan, direction: str) -> int:
    s, heads, rows = plan.sizes, plan.heads, plan.rows
    array = lambda n, width: _padded(n, heads * width, s.itemsize)  # noqa: E731
    query = array(rows, s.J * s.D) + array(rows, s.J * s.P)
    key, value, out = array(rows, s.D) + array(rows, s.P), array(rows, s.E), array(rows, s.J * s.E)
    bands = heads * s.J * (plan.bias + plan.taps) * _padded(1, plan.period, 4)
    states = heads * _padded(s.state_rows, s.E, 4) * ((not plan.fresh) + plan.final)
    before = array(plan.back, s.D) + array(plan.back, s.P) + array(plan.back, s.E)
    total = query + key + value + out + bands + states + _padded(FIELDS, plan.slots, 4) * (not plan.aligned)
    if direction == "forward":
        return 2 * (total + before * (not plan.fresh))
    queries = total + query + bands + before * (not plan.fresh)
    keys = total + before * (1 + 2 * (not plan.fresh)) + key + value + states
    return 2 * max(queries, keys)


def _kept_bytes(plan: TpuPlan, direction: str) -> int:
    """Kept between steps, and the largest values inside one."""
    s, heads, slots = plan.sizes, plan.heads, plan.slots
    state = _padded(s.state_rows, s.E, 4)
    bands = heads * s.J * (plan.bias + plan.taps) * _padded(plan.rows, slots, 4)
    window = lambda itemsize: sum(_padded(slots, heads * width, itemsize) for width in (s.D, s.D, s.E))  # noqa: E731
    weights = 4 * _padded(plan.rows, slots, 4)
    if direction == "forward":
        return (heads + 1) * state + window(s.itemsize) + bands + weights + _padded(plan.rows, s.E, 4)
    queries = (heads + 1) * state + window(s.itemsize) + 2 * bands + 2 * weights
    keys = (heads + 2) * state + window(4) + bands + 2 * weights + 2 * _padded(slots, s.E, 4)
    return max(queries, keys)
