"""Augmented attention as kernels for NVIDIA GPUs, forward and backward: the calls around `body.py`.

Arrays are read and written where they lie, [B, T, H, D], without transposed or padded copies; rows and channels beyond
their ends are masked. How the work is cut is in `blocks.py`, and what depends on Pallas' Triton lowering, which JAX
has deprecated and which runs on A100 and H100 alike, is in `triton.py`.
"""

# Letters beyond the legend: A = tokens that may be seen: those that a state remembers, then the row's; I = value
# tiles; Y = tokens that a state remembers, as if they stood before the row; Z = parts of a row.

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lin_jax.ops.layout import token_layout
from lin_jax.ops.linear_attention import chunk
from lin_jax.ops.linear_attention.gpu import triton
from lin_jax.ops.linear_attention.gpu.blocks import GpuPlan, GpuPlans, make_plans
from lin_jax.ops.linear_attention.gpu.blocks import refusal as refusal
from lin_jax.ops.linear_attention.gpu.body import (
    Extra,
    Floats,
    KeyOutputs,
    Layout,
    QueryOutputs,
    Refs,
    forward_kernel,
    key_gradients_kernel,
    query_gradients_kernel,
    sums_kernel,
)
from lin_jax.ops.linear_attention.inputs import Inputs
from lin_jax.ops.linear_attention.state import context_tokens


def attend(inputs: Inputs, device_kind: str) -> tuple[Float[Array, "B T H E"], None]:
    """Augmented attention of `inputs` on a device of this kind; on a CPU the kernels are interpreted."""
    plans = make_plans(inputs, device_kind)
    context = plans.forward.context
    layout = None if plans.forward.aligned else _layout(inputs, context)
    return _attend(plans, _floats(inputs, context), layout), None


def _floats(inputs: Inputs, length: int) -> Floats:
    context = None if inputs.fresh else context_tokens(inputs.initial_state, inputs.options)

    def join(before: Any, row: Any) -> Any:
        """The tokens that an initial state remembers go before the row's: the only copy of keys and values."""
        if before is None or row is None:
            return row
        return jnp.concatenate([_ending(before, length), row], axis=1)

    return Floats(
        q_BTHD=inputs.arrays.q_BTHD,
        k_BAKD=join(context and context.key_BYKD, inputs.arrays.k_BTKD),
        v_BAKE=join(context and context.value_BYKE, inputs.arrays.v_BTKE),
        grouped_q_BTHP=inputs.arrays.grouped_q_BTHP,
        grouped_k_BAKP=join(context and context.grouped_key_BYKP, inputs.arrays.grouped_k_BTKP),
        alpha_H=inputs.alpha_H,
        bias_HX=None if inputs.arrays.bias_XH is None or not inputs.options.scored else inputs.arrays.bias_XH.T,
        taps_HW=None if inputs.arrays.conv_WH is None else inputs.arrays.conv_WH.T,
        state_BKPE=None if inputs.fresh or not inputs.options.grouped else inputs.initial_state.state_BKPE,
    )


def _ending(x: Array, length: int, fill: int = 0) -> Array:
    """The last `length` entries along axis 1, after entries of `fill` where there are fewer."""
    x = x[:, max(0, x.shape[1] - length) :]
    return jnp.pad(x, ((0, 0), (length - x.shape[1], 0), *((0, 0),) * (x.ndim - 2)), constant_values=fill)


def _layout(inputs: Inputs, length: int) -> Layout:
    row = token_layout(inputs.segment_ids_BT, inputs.initial_state.length_B)
    real_run = jnp.where(row.real_BT, row.run_BT, -1)
    if inputs.fresh:
        return Layout(row.run_BT, real_run, real_run, row.position_BT)
    context = context_tokens(inputs.initial_state, inputs.options)
    join = lambda before, row: jnp.concatenate([before, row], axis=1)  # noqa: E731
    return Layout(
        run=join(jnp.zeros_like(row.run_BT, shape=(row.run_BT.shape[0], length)), row.run_BT),
        key_run=join(_ending(-context.folded_BY.astype(jnp.int32), length, -1), real_run),
        value_run=join(_ending(-(context.position_BY < 0).astype(jnp.int32), length, -1), real_run),
        position=join(_ending(context.position_BY, length, -1), row.position_BT),
    )


def _part_of(blocks: int, parts: int, first: int, part: int) -> tuple[int, int]:
    """First and last + 1 block of a part, of `blocks` that begin with block `first`; `part` of a kernel is the same."""
    each = -(-blocks // parts)
    return first + part * each, min(first + (part + 1) * each, first + blocks)


def _states(plan: GpuPlan, parts: int, floats: Floats, layout: Layout | None, y_gradient: Array | None) -> Array | None:
    """States where parts start, [B, Z, K, P, E] float32, or (given the gradient of y) their gradients where parts end.

    The first part's state (the last one's gradient) is left out where it is 0. None: there is no other.
    """
    reverse, zero = y_gradient is not None, None if y_gradient is not None else floats.state_BKPE
    if not plan.form.grouped:
        return None
    if parts == 1:
        return None if zero is None else zero[:, None]
    shape = (plan.batch, parts - 1, plan.key_heads, plan.grouped_size, plan.value_size)
    sums_BZKPE = triton.call(
        functools.partial(sums_kernel, plan, parts, reverse),
        plan,
        (plan.batch, plan.key_heads, parts - 1, plan.tiles),
        (Refs(floats, layout, Extra(y_gradient_BTHE=y_gradient)),),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    continues_BZ = _continues(plan, parts, layout, reverse)
    if reverse:
        return _prefix(None, sums_BZKPE[:, ::-1], None if continues_BZ is None else continues_BZ[:, ::-1])[:, ::-1]
    return _prefix(zero, sums_BZKPE, continues_BZ)


def _continues(plan: GpuPlan, parts: int, layout: Layout | None, reverse: bool) -> Array | None:
    """[B, Z - 1]: whether the run where part n + 1 starts is still that where part n does; None: always."""
    if layout is None or plan.lag is None:
        return None
    if reverse:
        ends = [min(_part_of(plan.blocks, parts, 0, n)[1] - 1 + plan.lag, plan.blocks - 1) for n in range(parts)]
        tokens = [(end + 1) * plan.rows for end in ends]
    else:
        starts = [_part_of(plan.blocks - plan.first_query, parts, plan.first_query, n)[0] for n in range(parts)]
        tokens = [max(0, start - plan.lag) * plan.rows - 1 for start in starts]
    token_Z = np.asarray(tokens)
    run_BZ = jnp.where((token_Z < 0)[None], 0, layout.run[:, np.clip(token_Z, 0, layout.run.shape[1] - 1)])
    return run_BZ[:, 1:] == run_BZ[:, :-1]


def _prefix(first_BKPE: Array | None, sums: Array, continues_BZ: Array | None) -> Array:
    """The state after each sum [B, Z, K, P, E], and before them the first, where there is one.

    Where a run ends, what went before is dropped.
    """
    starts = None if continues_BZ is None else ~continues_BZ
    if first_BKPE is not None:
        sums = jnp.concatenate([first_BKPE[:, None], sums], axis=1)
        starts = None if starts is None else jnp.pad(starts, ((0, 0), (1, 0)))
    if starts is None:
        return jax.lax.associative_scan(jnp.add, sums, axis=1)

    def combine(a: Any, b: Any) -> Any:
        return a[0] | b[0], jnp.where(b[0][..., None, None, None], b[1], a[1] + b[1])

    return jax.lax.associative_scan(combine, (starts, sums), axis=1)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plans: GpuPlans, floats: Floats, layout: Layout | None) -> Array:
    plan = plans.forward
    parts = plan.parts(plan.heads)
    states = _states(plan, parts, floats, layout, None)
    return triton.call(
        functools.partial(forward_kernel, plan, parts),
        plan,
        (plan.batch, plan.heads, parts, plan.tiles),
        (Refs(floats, layout, Extra(state_BZKPE=states)),),
        jax.ShapeDtypeStruct((plan.batch, plan.tokens, plan.heads, plan.value_size), floats.v_BAKE.dtype),
    )


def _attend_forward(plans: GpuPlans, floats: Floats, layout: Layout | None) -> tuple[Array, Any]:
    return _attend(plans, floats, layout), (floats, layout)


def _attend_backward(plans: GpuPlans, saved: Any, y_gradient: Array) -> tuple[Floats, None]:
    (floats, layout), plan = saved, plans.backward
    if plan.tiles == 1:
        whole = _query_gradients(plan, 1, floats, layout, y_gradient)
        keys = [_key_gradients(plan, 1, True, True, floats, layout, y_gradient, whole)]
        return _gradients(plan, floats, layout, y_gradient, [whole], keys), None
    # What is not linear in the weights' gradient needs all value tiles of it, the state's branch only its own.
    near, far = plan.only_near(), plan.only_far()
    queries = [_query_gradients(near, near.tiles, floats, layout, y_gradient)]
    keys = [_key_gradients(near, near.tiles, True, False, floats, layout, y_gradient, queries[0])]
    if plan.form.grouped:
        queries += [_query_gradients(far, 1, floats, layout, y_gradient)]
    keys += [_key_gradients(plan, 1, False, True, floats, layout, y_gradient, queries[0])]
    return _gradients(plan, floats, layout, y_gradient, queries, keys), None


_attend.defvjp(_attend_forward, _attend_backward)


def _query_gradients(
    plan: GpuPlan, inner: int, floats: Floats, layout: Layout | None, y_gradient: Array
) -> QueryOutputs:
    """Gradients of queries and tables by one call, of a grid of value tiles or of `inner` tiles one after another."""
    tiles, parts = -(-plan.tiles // inner), plan.parts(plan.heads)
    partial = plan.tiles > 1
    grid = (plan.batch, plan.heads, parts, tiles)
    per_query = jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.tokens), jnp.float32)
    pairs = (*grid[:3], plan.reach + 1, plan.rows, plan.rows)
    softmax = plan.form.local == "softmax"
    own = plan.form.own_grouped
    outputs = QueryOutputs(
        q=_gradient_shape(floats.q_BTHD, tiles, partial) if plan.form.scored or plan.taps or not own else None,
        grouped_q=_gradient_shape(floats.grouped_q_BTHP, tiles, partial) if own and plan.form.grouped else None,
        alpha_BHZI=jax.ShapeDtypeStruct(grid, jnp.float32) if plan.form.grouped else None,
        log_total_BHT=per_query if softmax else None,
        delta_BHT=per_query if softmax else None,
        bias_pairs=jax.ShapeDtypeStruct(pairs, jnp.float32) if plan.bias else None,
        taps_pairs=jax.ShapeDtypeStruct(pairs, jnp.float32) if plan.taps else None,
    )
    states = _states(plan, parts, floats, layout, None)
    refs = Refs(floats, layout, Extra(state_BZKPE=states, y_gradient_BTHE=y_gradient))
    zeros = tuple(jnp.zeros(x.shape, x.dtype) for x in outputs[5:] if x is not None)
    leaves, count = len(jax.tree.leaves(refs)), len(jax.tree.leaves(outputs))
    aliases = {leaves + n: count - len(zeros) + n for n in range(len(zeros))}
    return triton.call(
        functools.partial(query_gradients_kernel, plan, parts, inner), plan, grid, (refs, zeros), outputs, aliases
    )


def _key_gradients(
    plan: GpuPlan,
    inner: int,
    local: bool,
    values: bool,
    floats: Floats,
    layout: Layout | None,
    y_gradient: Array,
    queries: QueryOutputs,
) -> KeyOutputs:
    """Gradients of keys and values by one call, of a grid of value tiles or of `inner` tiles one after another."""
    tiles, parts, form = -(-plan.tiles // inner), plan.parts(plan.key_heads), plan.form
    partial, own = plan.tiles > 1, plan.form.own_grouped
    outputs = KeyOutputs(
        k=_gradient_shape(floats.k_BAKD, tiles, partial) if local or (form.grouped and not own) else None,
        grouped_k=_gradient_shape(floats.grouped_k_BAKP, tiles, partial) if own and form.grouped else None,
        v=_gradient_shape(floats.v_BAKE, 1, False) if values else None,
    )
    states = _states(plan, parts, floats, layout, y_gradient)
    extra = Extra(states, y_gradient, queries.log_total_BHT, queries.delta_BHT)
    kernel = functools.partial(key_gradients_kernel, plan, parts, inner, local)
    grid = (plan.batch, plan.key_heads, parts, tiles)
    return triton.call(kernel, plan, grid, (Refs(floats, layout, extra),), outputs)


def _gradient_shape(x: Any, tiles: int, partial: bool) -> jax.ShapeDtypeStruct:
    """Of a gradient, or of its float32 terms: one a value tile, or the whole of one branch."""
    return jax.ShapeDtypeStruct((tiles, *x.shape) if tiles > 1 else x.shape, jnp.float32 if partial else x.dtype)


def _gradients(
    plan: GpuPlan,
    floats: Floats,
    layout: Layout | None,
    y_gradient: Array,
    queries: list[QueryOutputs],
    keys: list[KeyOutputs],
) -> Floats:
    """The gradients from what the kernels wrote."""

    def total(x: Any, terms: list[Any]) -> Any:
        terms = [term.sum(axis=0) if term.ndim == x.ndim + 1 else term for term in terms if term is not None]
        return None if x is None else sum(terms[1:], terms[0]).astype(x.dtype) if terms else jnp.zeros_like(x)

    alpha = [x.alpha_BHZI.sum(axis=(0, 2, 3)) for x in queries if x.alpha_BHZI is not None]
    return Floats(
        q_BTHD=total(floats.q_BTHD, [x.q for x in queries]),
        k_BAKD=total(floats.k_BAKD, [x.k for x in keys]),
        v_BAKE=total(floats.v_BAKE, [x.v for x in keys]),
        grouped_q_BTHP=total(floats.grouped_q_BTHP, [x.grouped_q for x in queries]),
        grouped_k_BAKP=total(floats.grouped_k_BAKP, [x.grouped_k for x in keys]),
        alpha_H=alpha[0] if alpha else jnp.zeros_like(floats.alpha_H),
        bias_HX=_by_distance(floats.bias_HX, queries[0].bias_pairs),
        taps_HW=_by_distance(floats.taps_HW, queries[0].taps_pairs),
        state_BKPE=_state_gradient(plan, floats, layout, y_gradient),
    )


def _by_distance(table_HX: Array | None, by_pair: Array | None) -> Array | None:
    """The gradient of a table by distance: the sums of the diagonals of its entries for pairs of blocks."""
    if table_HX is None or by_pair is None:
        return None if table_HX is None else jnp.zeros_like(table_HX)
    pairs = by_pair.sum(axis=(0, 2))
    H, offsets, rows, _ = pairs.shape
    # Row r of the mirrored matrix is moved r to the right: then entries of one distance stand in one column.
    mirrored = jnp.pad(pairs[..., ::-1], ((0, 0), (0, 0), (0, 0), (0, rows)))
    skewed = mirrored.reshape(H, offsets, -1)[..., : rows * (2 * rows - 1)].reshape(H, offsets, rows, -1)
    diagonals = skewed.sum(axis=2)  # of distance offset * rows + column - (rows - 1)
    line = jnp.zeros((H, (offsets + 1) * rows), jnp.float32)
    for offset in range(offsets):
        start = max(0, rows - 1 - offset * rows)
        at = offset * rows + start - (rows - 1)
        line = line.at[:, at : at + 2 * rows - 1 - start].add(diagonals[:, offset, start:])
    X = table_HX.shape[1]
    return jnp.pad(line, ((0, 0), (0, max(0, X - line.shape[1]))))[:, :X]


def _state_gradient(plan: GpuPlan, floats: Floats, layout: Layout | None, y_gradient: Array) -> Array | None:
    """Gradient of the initial state: of all queries whose run it belongs to."""
    if floats.state_BKPE is None or layout is None:
        return None
    own_BT = layout.value_run[:, plan.context :] == 0
    _, q = chunk.operand(plan.form, floats.q_BTHD, floats.grouped_q_BTHP)
    q = jnp.where(own_BT[..., None, None], jnp.asarray(q), 0)
    q = q.reshape(*q.shape[:2], plan.key_heads, plan.sharing, -1)
    weighted = (floats.alpha_H.reshape(1, 1, -1, 1) * y_gradient.astype(jnp.float32)).astype(q.dtype)
    weighted = weighted.reshape(*q.shape[:4], -1)
    return jnp.einsum("btkjp,btkje->bkpe", q, weighted, preferred_element_type=jnp.float32)
