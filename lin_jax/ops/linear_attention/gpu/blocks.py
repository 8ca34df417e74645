"""How the GPU kernel cuts its work: blocks of tokens, windows, value tiles and parts of a row. No Pallas here.

A row of key tokens (those that an initial state remembers, then the row's own) is cut in blocks. Block i of queries
sees the blocks `lowest(i)` .. i of keys one by one and everything before them in a state [P, E].

- One program a head and value tile goes through all blocks of its row with the state on the chip, when rows, heads and
  value tiles fill the chip.
- Otherwise the row is cut in `parts`. A first pass sums what every part adds to the state, a prefix over these few sums
  gives the state at the start of each part, and then all parts run at once. The sums are the only states in memory:
  `parts` is the least number that fills the chip, but not so large that they exceed STATE_SHARE of the tokens' bytes.
"""

import dataclasses
import functools
import tomllib
from importlib import resources
from typing import Any, NamedTuple

from lin_jax.ops.linear_attention import chunk
from lin_jax.ops.linear_attention.chunk import Form, form_of
from lin_jax.ops.linear_attention.inputs import Inputs

# The sums of all parts in float32, and their prefix, stay under this share of the bytes of q, k, v and y.
STATE_SHARE = 0.04
# A part of fewer blocks spends more time on its state than on its tokens.
BLOCKS_PER_PART = 4
# float32 numbers of the state that a program carries; more do not fit its registers beside the blocks.
STATE_SIZE = 128 * 128
# Values of a head up to here take the sizes of the passes `forward` and `backward`.
NARROW = 128
# Slots in the local window: beyond this softmax attention's own kernels are the right form.
MOST_SLOTS = 1024


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes of one pass on one device, from the table `blocks.toml`.

    Attributes:
        rows: tokens in a block.
        value_tile: values of a head that one program computes, at most.
        warps: warps of a program.
        stages: depth of the software pipeline of loads.
        programs: programs that fill the chip: its multiprocessors.
    """

    rows: int
    value_tile: int
    warps: int
    stages: int
    programs: int


@functools.cache
def table() -> dict[str, Any]:
    """The sizes of every device."""
    return tomllib.loads((resources.files(__package__) / "blocks.toml").read_text(encoding="utf-8"))


def tuning(device_kind: str, name: str) -> Tuning:
    """Sizes of the pass `name` in the row of the table whose name occurs in `device_kind`, else in the default row.

    The passes are forward and backward, and both with the end `_wide` for values wider than NARROW.
    """
    row = table()[next((kind for kind in table() if kind in device_kind), "default")]
    return Tuning(programs=row["programs"], **row[name])


@dataclasses.dataclass(frozen=True)
class GpuPlan:
    """All static facts of one call.

    Attributes:
        form: static options of the op.
        tuning: the device's row of the table.
        tokens: queries T of a row.
        context: key tokens before the row, a multiple of the block, 0 where there is no initial state.
        taps: taps of the convolution, 0 where it is off.
        aligned: every row is one sequence from its first token.
        initial: whether a state goes before the first key token.
        lag: blocks before its own that a block of queries sees one by one in both branches; the state holds those
            before them. None: it varies, as a group has several blocks and the row is aligned. The convolution may
            reach further back, see `reach`.
    """

    form: Form
    tuning: Tuning
    batch: int
    tokens: int
    context: int
    heads: int
    key_heads: int
    size: int
    grouped_size: int
    value_size: int
    group_size: int
    local_groups: int
    taps: int
    bias: bool
    aligned: bool
    initial: bool
    lag: int | None
    itemsize: int

    @property
    def rows(self) -> int:
        """Tokens in a block."""
        return self.tuning.rows

    @property
    def sharing(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.key_heads

    @property
    def first_query(self) -> int:
        """The first block of queries, counted in blocks of key tokens."""
        return self.context // self.rows

    @property
    def blocks(self) -> int:
        """Blocks of key tokens."""
        return -(-(self.context + self.tokens) // self.rows)

    @property
    def band_lag(self) -> int:
        """Earlier blocks that the convolution reaches."""
        return -(-max(0, self.taps - 1) // self.rows)

    @property
    def reach(self) -> int:
        """Most earlier blocks that a block of queries sees one by one in any branch."""
        if self.lag is not None:
            return max(self.lag, self.band_lag)
        return max(self.local_groups * self.group_size // self.rows - 1, self.band_lag)

    @property
    def tile(self) -> int:
        """Values in a value tile, a power of two."""
        fits = STATE_SIZE // padded(self.grouped_size) if self.form.grouped else self.tuning.value_tile
        return max(16, min(padded(self.value_size), self.tuning.value_tile, fits))

    @property
    def tiles(self) -> int:
        """Value tiles of a head."""
        return -(-self.value_size // self.tile)

    def parts(self, heads: int) -> int:
        """Parts of a row for a pass with programs for `heads` heads: the least that fill the chip, but few states."""
        wanted = -(-self.tuning.programs // (self.batch * heads * self.tiles))
        if not self.form.grouped:
            return max(1, min(wanted, self.blocks))
        state = 4 * self.key_heads * self.grouped_size * self.value_size
        width = self.heads * (self.size + self.value_size) + self.key_heads * (self.size + self.value_size)
        states = int(STATE_SHARE * self.itemsize * self.tokens * width / state)
        # One sum is the state of the second part; more are summed up, and the scan holds them about three times.
        most = 1 + max(min(states, 1), states // 3)
        return max(1, min(wanted, most, self.blocks // BLOCKS_PER_PART))

    def only_near(self) -> "GpuPlan":
        """The local branch and the convolution alone; blocks stay as they are."""
        return dataclasses.replace(self, form=dataclasses.replace(self.form, grouped=False))

    def only_far(self) -> "GpuPlan":
        """The grouped branch alone; blocks stay as they are."""
        return dataclasses.replace(self, form=dataclasses.replace(self.form, local="none"), taps=0, bias=False)

    def kinds(self, offset: int | None) -> "Kinds":
        """Which entries blocks `offset` apart can have; None: of an unknown offset."""
        if offset is None or self.lag is None:
            return Kinds("some" if self.form.scored else "none", "some" if self.form.grouped else "none", self.taps > 0)
        if self.aligned and self.rows % self.group_size == 0:
            groups = self.rows // self.group_size
            least, most = max(0, (offset - 1) * groups + 1), offset * groups + groups - 1
        else:
            # Tokens at a distance of d are d // G or one more groups apart.
            least = max(0, (offset - 1) * self.rows + 1) // self.group_size
            most = ((offset + 1) * self.rows - 1) // self.group_size + 1
        near = "none" if least >= self.local_groups else "all" if most < self.local_groups else "some"
        far = "none" if most < self.local_groups else "all" if least >= self.local_groups else "some"
        seen = offset <= self.lag
        return Kinds(
            near if seen and self.form.scored else "none",
            far if seen and self.form.grouped else "none",
            max(0, (offset - 1) * self.rows + 1) < self.taps,
        )


class Kinds(NamedTuple):
    """Which pairs of tokens of two blocks are near (in the local window) and far by their groups: none, some or all.

    `band` is whether the convolution reaches any.
    """

    near: str
    far: str
    band: bool


def padded(size: int) -> int:
    """The power of two, 16 at least, that Triton needs for an axis of `size`."""
    return max(16, 1 << max(0, size - 1).bit_length())


class GpuPlans(NamedTuple):
    """The plans of the two passes."""

    forward: GpuPlan
    backward: GpuPlan


def make_plans(inputs: Inputs, device_kind: str) -> GpuPlans:
    """The plans for `inputs` on a device of this kind."""
    wide = "_wide" if inputs.arrays.v_BTKE.shape[-1] > NARROW else ""
    plans = GpuPlans(*(_make_plan(inputs, tuning(device_kind, name + wide)) for name in GpuPlans._fields))
    if inputs.fresh:
        return plans
    context = max(plan.reach * plan.rows for plan in plans)
    context = -(-context // max(plan.rows for plan in plans)) * max(plan.rows for plan in plans)
    return GpuPlans(*(dataclasses.replace(plan, context=context) for plan in plans))


def _make_plan(inputs: Inputs, sizes: Tuning) -> GpuPlan:
    B, T, H, D = inputs.arrays.q_BTHD.shape
    _, _, K, E = inputs.arrays.v_BTKE.shape
    # What the table was chosen for is at most 128 channels of bfloat16 or float16, and masks from positions alone. Of
    # more bytes half as many rows fit the registers, and masks of segments need those of 8 warps.
    large = D > NARROW or inputs.arrays.v_BTKE.dtype.itemsize > 2
    rows = min(max(16, sizes.rows // 2) if large else sizes.rows, padded(T))
    aligned = inputs.aligned and inputs.fresh  # What an initial state does not know has to be masked.
    return GpuPlan(
        form=form_of(inputs),
        tuning=dataclasses.replace(sizes, rows=rows, warps=sizes.warps if aligned else max(8, sizes.warps)),
        batch=B,
        tokens=T,
        context=0,
        heads=H,
        key_heads=K,
        size=D,
        grouped_size=D if inputs.arrays.grouped_q_BTHP is None else inputs.arrays.grouped_q_BTHP.shape[-1],
        value_size=E,
        group_size=inputs.options.group_size,
        local_groups=inputs.options.local_groups,
        taps=0 if inputs.arrays.conv_WH is None else inputs.arrays.conv_WH.shape[0],
        bias=inputs.arrays.bias_XH is not None and inputs.options.scored,
        aligned=aligned,
        initial=not inputs.fresh,
        lag=_lag(rows, inputs.options.group_size, inputs.options.local_groups, aligned),
        itemsize=inputs.arrays.v_BTKE.dtype.itemsize,
    )


def _lag(rows: int, G: int, R: int, aligned: bool) -> int | None:
    if aligned and rows < G and G % rows == 0:
        return None
    if aligned and rows % G == 0:
        return -(-(R - 1) * G // rows)
    return -(-(R * G - 1) // rows)


def refusal(inputs: Inputs, device_kind: str) -> str | None:
    """Why the kernel cannot run for these inputs, or None."""
    sizes = {inputs.arrays.q_BTHD.shape[-1], inputs.arrays.k_BTKD.shape[-1]}
    if inputs.arrays.grouped_q_BTHP is not None:
        sizes.add(inputs.arrays.grouped_q_BTHP.shape[-1])
    types = sorted({str(x.dtype) for x in inputs.arrays.tokens})
    if (reason := chunk.refusal(inputs.options)) is not None:
        return reason
    if len(types) > 1 or types[0] not in ("bfloat16", "float16", "float32"):
        return f"it needs arrays of one type, bfloat16, float16 or float32, not {', '.join(types)}"
    if max(sizes) > 256:
        return f"its heads have at most 256 channels, not {max(sizes)}"
    if inputs.options.slots > MOST_SLOTS:
        return f"its window has at most {MOST_SLOTS} slots, not group_size * local_groups = {inputs.options.slots}"
    return None
