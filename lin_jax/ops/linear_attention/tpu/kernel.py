"""Augmented attention as one pass over q, k and v on a TPU.

A row is cut in blocks; a program takes some key/value heads of a row through all blocks, one after the other. Keys and
values of the window and the state of all earlier tokens stay in vector memory, so that every input is read once and
nothing but y is written. The backward pass visits blocks twice: in forward order for the gradients of queries, alpha,
bias and filter (the states are computed again), and in reverse order for those of keys, values and the initial state,
with the gradient of the state and of the window in vector memory.

Arrays are taken as they are, [B, T, H, D] as [B, T, H D] without a copy: a head is a stretch of lanes. The last block
may reach beyond the row, where memory holds anything: what is read from there is replaced by zeros.
"""

# Letters beyond the legend: Y = tokens that a state remembers, as if they stood before the row.

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from lin_jax.ops.linear_attention import chunk
from lin_jax.ops.linear_attention.inputs import Inputs
from lin_jax.ops.linear_attention.state import context_tokens
from lin_jax.ops.linear_attention.tpu import body
from lin_jax.ops.linear_attention.tpu import window_layout as wl
from lin_jax.ops.linear_attention.tpu.blocks import TpuPlan, make_plan
from lin_jax.ops.linear_attention.tpu.cost import Cost, forward_cost, key_cost, query_cost

# How the kernel runs where there is no TPU.
SIMULATION: Any = True


class Arguments(NamedTuple):
    """What the gradients are of, and the fields of both passes' windows. None: there is no such argument.

    Heads and sizes are one axis of lanes. `key_before` and so on are tokens before the row, at least as many as a
    window reaches back; `fields_forward` and `fields_backward` are those of `window_layout`.
    """

    query: Float[Array, "B T HD"]
    key: Float[Array, "B T KD"]
    grouped_query: Float[Array, "B T HP"] | None
    grouped_key: Float[Array, "B T KP"] | None
    value: Float[Array, "B T KE"]
    alpha_H: Float[Array, " H"]
    bias_XH: Float[Array, "X H"] | None
    conv_WH: Float[Array, "W H"] | None
    key_before: Float[Array, "B Y KD"] | None
    grouped_key_before: Float[Array, "B Y KP"] | None
    value_before: Float[Array, "B Y KE"] | None
    state: Float[Array, "B K P E"] | None
    fields_forward: Any
    fields_backward: Any


class Small(NamedTuple):
    """What a pass makes of the arguments that are small.

    `alpha` is [H, 1, 1], `bias` and `taps` are lines of bands [H, 1, period], and the rest are tokens before the row.
    """

    alpha: Array
    bias: Array | None
    taps: Array | None
    key_before: Array | None
    grouped_key_before: Array | None
    value_before: Array | None


class TpuPlans(NamedTuple):
    """Of both directions; they differ in block sizes alone."""

    forward: TpuPlan
    backward: TpuPlan


def refusal(inputs: Inputs, device_kind: str) -> str | None:
    """Why the kernel cannot run for these inputs on a device of this kind; None if it can."""
    if (reason := chunk.refusal(inputs.options)) is not None:
        return reason
    types = {x.dtype for x in inputs.arrays.tokens}
    if len(types) > 1 or not types <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return f"q, k and v must all be float32 or all bfloat16, but are {', '.join(sorted(map(str, types)))}"
    plans = (make_plan(inputs, device_kind, direction) for direction in ("forward", "backward"))
    return next((plan for plan in plans if isinstance(plan, str)), None)


def attend(inputs: Inputs, device_kind: str) -> tuple[Float[Array, "B T H E"], Float[Array, "B K P E"] | None]:
    """Outputs, and the folded state after the row if `inputs.return_state` and there is a grouped branch."""
    arrays = inputs.arrays
    if not inputs.options.scored and not inputs.options.grouped and arrays.conv_WH is None:
        return jnp.zeros((*arrays.q_BTHD.shape[:3], arrays.v_BTKE.shape[-1]), arrays.v_BTKE.dtype), None
    forward, backward = (make_plan(inputs, device_kind, direction) for direction in ("forward", "backward"))
    assert isinstance(forward, TpuPlan) and isinstance(backward, TpuPlan)
    y, state = _attend(TpuPlans(forward, backward), _arguments(inputs, forward, backward))
    return y.reshape(*inputs.arrays.q_BTHD.shape[:3], -1), state


def _arguments(inputs: Inputs, forward: TpuPlan, backward: TpuPlan) -> Arguments:
    lanes: Any = lambda x: None if x is None else x.reshape(*x.shape[:2], -1)  # noqa: E731
    own = forward.form.own_grouped
    key_before = grouped_key_before = value_before = None
    if not inputs.fresh:
        context = context_tokens(inputs.initial_state, inputs.options)
        last = lambda x: lanes(wl.last_slots(x, max(forward.back, backward.back)))  # noqa: E731
        key_before, value_before = last(context.key_BYKD), last(context.value_BYKE)
        grouped_key_before = last(context.grouped_key_BYKP) if own else None
    fields = lambda plan: None if plan.aligned else wl.window_fields(inputs, plan.rows, plan.back)  # noqa: E731
    return Arguments(
        lanes(inputs.arrays.q_BTHD),
        lanes(inputs.arrays.k_BTKD),
        lanes(inputs.arrays.grouped_q_BTHP) if own else None,
        lanes(inputs.arrays.grouped_k_BTKP) if own else None,
        lanes(inputs.arrays.v_BTKE),
        inputs.alpha_H,
        inputs.arrays.bias_XH if forward.bias else None,
        inputs.arrays.conv_WH,
        key_before,
        grouped_key_before,
        value_before,
        inputs.initial_state.state_BKPE if inputs.options.grouped and not inputs.fresh else None,
        fields(forward),
        fields(backward),
    )


def _small(plan: TpuPlan, arguments: Arguments) -> Small:
    a = arguments
    line = lambda x: None if x is None else _line(plan, x)  # noqa: E731
    before = lambda x: None if x is None else wl.last_slots(x, plan.back)  # noqa: E731
    tokens = (before(x) for x in (a.key_before, a.grouped_key_before, a.value_before))
    return Small(a.alpha_H[:, None, None], line(a.bias_XH), line(a.conv_WH), *tokens)


def _line(plan: TpuPlan, by_distance: Float[Array, "X H"]) -> Float[Array, "H 1 period"]:
    """The entries of a band by slot - query, modulo the period; `_skew` makes the band where it is used."""
    by_distance = by_distance[: plan.slots]
    entries = jnp.pad(by_distance.T, ((0, 0), (0, plan.period - by_distance.shape[0])))
    return jnp.roll(jnp.flip(entries, axis=1), plan.back + 1, axis=1)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plans: TpuPlans, arguments: Arguments) -> tuple[Array, Array | None]:
    return _forward(plans.forward, arguments, _small(plans.forward, arguments))


def _attend_forward(plans: TpuPlans, arguments: Arguments) -> tuple[tuple[Array, Array | None], Arguments]:
    return _attend(plans, arguments), arguments


def _attend_backward(plans: TpuPlans, arguments: Arguments, gradients: tuple[Array, Array | None]) -> tuple[Arguments]:
    plan, (y, final) = plans.backward, gradients
    small, small_gradients = jax.vjp(
        lambda a: _small(plan, a), arguments._replace(fields_forward=None, fields_backward=None)
    )
    of_queries = _query_gradients(plan, arguments, small, y)
    of_keys = _key_gradients(plan, arguments, small, y, final)
    of_small: dict[str, Array] = {
        name: of_queries[name].sum(axis=0) for name in ("alpha", "bias", "taps") if name in of_queries
    }
    of_small |= {name: x for name, x in of_keys.items() if name.endswith("_before")}
    zeros: dict[str, Array] = {name: jnp.zeros_like(x) for name, x in small._asdict().items() if x is not None}
    (gradient,) = small_gradients(small._replace(**{**zeros, **of_small}))
    return (
        gradient._replace(
            query=of_queries["query"],
            grouped_query=of_queries.get("grouped_query"),
            key=of_keys["key"],
            grouped_key=of_keys.get("grouped_key"),
            value=of_keys["value"],
            state=of_keys.get("state"),
        ),
    )


_attend.defvjp(_attend_forward, _attend_backward)


# How arrays are divided. The grid is (rows of the batch, steps of heads, blocks).


class BlockedArray(NamedTuple):
    """An array and its block, or the shape of a result and its block."""

    array: Any
    block: tuple[int, ...]
    where: Callable[..., tuple[Any, ...]]

    @property
    def spec(self) -> pl.BlockSpec:
        """Of a kernel's argument or result."""
        return pl.BlockSpec(self.block, self.where)


def _tokens(plan: TpuPlan, array: Any, reverse: bool = False) -> BlockedArray:
    """[B, T, lanes], a block of rows."""
    steps = plan.sizes.K // plan.heads
    block = (1, plan.rows, array.shape[2] // steps)
    return BlockedArray(array, block, lambda b, h, n: (b, _block(plan, n, reverse), h))


def _block(plan: TpuPlan, n: Any, reverse: bool) -> Any:
    return plan.blocks - 1 - n if reverse else n


def _per_head(plan: TpuPlan, array: Any) -> BlockedArray:
    """[H, ...], the same in all blocks."""
    heads, rest = plan.heads * plan.sizes.J, array.shape[1:]
    return BlockedArray(array, (heads, *rest), lambda b, h, n: (h, *(0,) * len(rest)))


def _per_row_and_head(plan: TpuPlan, array: Any, heads: int) -> BlockedArray:
    """[B, heads, ...], the same in all blocks."""
    rest = array.shape[2:]
    return BlockedArray(array, (1, heads, *rest), lambda b, h, n: (b, h, *(0,) * len(rest)))


def _before(plan: TpuPlan, array: Any) -> BlockedArray:
    """[B, back, lanes], whole."""
    steps = plan.sizes.K // plan.heads
    return BlockedArray(array, (1, array.shape[1], array.shape[2] // steps), lambda b, h, n: (b, 0, h))


def _fields(plan: TpuPlan, array: Any, reverse: bool = False) -> BlockedArray:
    """[B, N, fields, slots], a block's."""
    return BlockedArray(array, (1, 1, *array.shape[2:]), lambda b, h, n: (b, _block(plan, n, reverse), 0, 0))


def _inputs(plan: TpuPlan, a: Arguments, small: Small, fields: Any, reverse: bool = False) -> dict[str, BlockedArray]:
    blocked = {
        name: _tokens(plan, getattr(a, name), reverse)
        for name in ("query", "key", "grouped_query", "grouped_key", "value")
        if getattr(a, name) is not None
    }
    blocked |= {
        name: _per_head(plan, x) for name in ("alpha", "bias", "taps") if (x := getattr(small, name)) is not None
    }
    if fields is not None:
        blocked["fields"] = _fields(plan, fields, reverse)
    return blocked


def _initial(plan: TpuPlan, a: Arguments, small: Small) -> dict[str, BlockedArray]:
    if plan.fresh:
        return {}
    names = ("key_before", "grouped_key_before", "value_before")
    blocked = {name: _before(plan, x) for name in names if plan.back and (x := getattr(small, name)) is not None}
    if a.state is not None:
        blocked["state"] = _per_row_and_head(plan, a.state, plan.heads)
    return blocked


def _run(
    name: str,
    body: Callable[..., None],
    plan: TpuPlan,
    inputs: dict[str, BlockedArray],
    outputs: dict[str, BlockedArray],
    scratch: dict[str, tuple[tuple[int, ...], Any]],
    cost: Cost,
) -> dict[str, Array]:
    """Runs `body`, which is given a dictionary of references by the names of inputs, outputs and scratch."""
    names = [*inputs, *(f"{name}_out" for name in outputs), *scratch]

    def kernel(*refs: Any) -> None:
        body(dict(zip(names, refs, strict=True)))

    def call(interpret: Any) -> Callable[..., Sequence[Array]]:
        return pl.pallas_call(
            kernel,
            grid=(plan.sizes.B, plan.sizes.K // plan.heads, plan.blocks),
            in_specs=[one.spec for one in inputs.values()],
            out_specs=[one.spec for one in outputs.values()],
            out_shape=[one.array for one in outputs.values()],
            scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=plan.vmem_bytes
            ),
            cost_estimate=pl.CostEstimate(**cost._asdict()),
            interpret=interpret,
            name=f"augmented_attention_{name}",
        )

    arrays = [one.array for one in inputs.values()]
    # The lowering decides: a program may be compiled for TPUs where there is none.
    results = jax.lax.platform_dependent(*arrays, tpu=call(False), default=call(SIMULATION))
    return dict(zip(outputs, results, strict=True))


def _like(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


# The passes.


def _forward(plan: TpuPlan, a: Arguments, small: Small) -> tuple[Array, Array | None]:
    s = plan.sizes
    outputs = {"y": _tokens(plan, _like((s.B, s.T, s.H * s.E), a.value.dtype))}
    if plan.final:
        state = _like((s.B, s.K, s.state_rows, s.E), jnp.float32)
        outputs["state"] = _per_row_and_head(plan, state, plan.heads)
    inputs = {**_inputs(plan, a, small, a.fields_forward), **_initial(plan, a, small)}
    run_block = functools.partial(body.forward_body, plan)
    scratch = {**_window_scratch(plan, a), **_band_scratch(plan, "band")}
    results = _run("forward", run_block, plan, inputs, outputs, scratch, forward_cost(plan))
    return results["y"], results.get("state")


def _query_gradients(plan: TpuPlan, a: Arguments, small: Small, y: Array) -> dict[str, Array]:
    s = plan.sizes
    inputs = {**_inputs(plan, a, small, a.fields_backward), **_initial(plan, a, small), "y": _tokens(plan, y)}
    outputs = {"query": _tokens(plan, _like(a.query.shape, a.query.dtype))}
    if a.grouped_query is not None:
        outputs["grouped_query"] = _tokens(plan, _like(a.grouped_query.shape, a.grouped_query.dtype))
    for name in ("alpha", "bias", "taps"):
        if (x := getattr(small, name)) is not None:
            outputs[name] = _per_row_and_head(plan, _like((s.B, *x.shape), jnp.float32), plan.heads * s.J)
    run_block = functools.partial(body.query_body, plan)
    scratch = {**_window_scratch(plan, a), **_band_scratch(plan, "band"), **_band_scratch(plan, "sum")}
    return _run("queries", run_block, plan, inputs, outputs, scratch, query_cost(plan))


def _key_gradients(plan: TpuPlan, a: Arguments, small: Small, y: Array, final: Array | None) -> dict[str, Array]:
    s, f32 = plan.sizes, jnp.float32
    inputs = {**_inputs(plan, a, small, a.fields_backward, reverse=True), "y": _tokens(plan, y, reverse=True)}
    names = [n for n in ("key", "grouped_key", "value") if getattr(a, n) is not None]
    for name in names:
        for piece in range(plan.pieces):
            inputs[f"{name}_{piece}"] = _piece(plan, getattr(a, name), piece)
            if not plan.fresh:
                inputs[f"{name}_before_{piece}"] = _piece_before(plan, getattr(small, f"{name}_before"), piece)
    if plan.final:
        inputs["final"] = _per_row_and_head(plan, final, plan.heads)
    outputs = {n: _tokens(plan, _like(getattr(a, n).shape, getattr(a, n).dtype), reverse=True) for n in names}
    if not plan.fresh:
        if plan.back:
            before = {f"{n}_before": getattr(small, f"{n}_before") for n in names}
            outputs |= {n: _before(plan, _like(x.shape, x.dtype)) for n, x in before.items()}
        if a.state is not None:
            outputs["state"] = _per_row_and_head(plan, _like(a.state.shape, f32), plan.heads)
    scratch = {
        "key_sum": ((plan.slots, plan.heads * s.D), f32),
        "grouped_key_sum": ((plan.slots, plan.heads * s.state_rows), f32),
        "value_sum": ((plan.slots, plan.heads * s.E), f32),
        "state_sum": ((plan.heads, s.state_rows, s.E), f32),
        **_band_scratch(plan, "band"),
    }
    run_block = functools.partial(body.key_body, plan)
    return _run("keys", run_block, plan, inputs, outputs, scratch, key_cost(plan))


def _window_scratch(plan: TpuPlan, a: Arguments) -> dict[str, tuple[tuple[int, ...], Any]]:
    """What the passes in forward order keep: the window, as it is multiplied, and the state before it."""
    s, form = plan.sizes, plan.form
    scratch: dict[str, tuple[tuple[int, ...], Any]] = {"value_window": ((plan.slots, plan.heads * s.E), a.value.dtype)}
    if form.scored:
        scratch["key_window"] = ((plan.slots, plan.heads * s.D), a.key.dtype)
    if form.grouped:
        if not form.shared:
            scratch["grouped_key_window"] = ((plan.slots, plan.heads * s.state_rows), a.key.dtype)
        scratch["state_sum"] = ((plan.heads, s.state_rows, s.E), jnp.float32)
    return scratch


def _band_scratch(plan: TpuPlan, what: str) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Bands of all heads of a step, or sums over blocks of their gradients."""
    shape = (plan.heads * plan.sizes.J, plan.rows, plan.slots)
    names = [name for name, there in (("bias", plan.bias), ("taps", plan.taps)) if there]
    return {f"{name}_{what}": (shape, jnp.float32) for name in names}


def _piece(plan: TpuPlan, array: Array, piece: int) -> BlockedArray:
    """[B, T, lanes], a piece of the window before a block; visited in reverse order."""
    steps, each = plan.sizes.K // plan.heads, plan.rows // plan.piece

    def index(b, h, n):
        first = (plan.blocks - 1 - n) * each - plan.pieces
        return b, jnp.maximum(first + piece, 0), h

    return BlockedArray(array, (1, plan.piece, array.shape[2] // steps), index)


def _piece_before(plan: TpuPlan, array: Array, piece: int) -> BlockedArray:
    """[B, back, lanes], what stands in place of a piece that begins before the row."""
    steps, each = plan.sizes.K // plan.heads, plan.rows // plan.piece

    def index(b, h, n):
        return b, jnp.minimum((plan.blocks - 1 - n) * each + piece, plan.pieces - 1), h

    return BlockedArray(array, (1, plan.piece, array.shape[2] // steps), index)
