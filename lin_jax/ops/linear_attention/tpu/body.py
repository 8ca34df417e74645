"""What a program of the TPU kernel does with one block of tokens, see `kernel.py`.

`refs` are references to vector memory by name: inputs, outputs (ending in `_out`) and what is kept between blocks. `n`
is the block. Heads are stretches of lanes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from lin_jax.ops.linear_attention import chunk
from lin_jax.ops.linear_attention.chunk import Bands, BlockOperands, Masks
from lin_jax.ops.linear_attention.tpu import window_layout as wl
from lin_jax.ops.linear_attention.tpu.blocks import TpuPlan

Refs = dict[str, Any]


def _lanes(i: int, width: int) -> slice:
    return slice(i * width, (i + 1) * width)


def _inside(plan: TpuPlan, n: Any, x: Array) -> Array:
    """x with zeros in the rows that are not of the row."""
    if not plan.ragged:
        return x
    index = n * plan.rows + jax.lax.broadcasted_iota(jnp.int32, (plan.rows, 1), 0)
    return jnp.where(index < plan.sizes.T, x, jnp.zeros_like(x))


class _Seen(NamedTuple):
    """Masks of a block; `fold`, `keep` and so on say what the state after it has, and the final state."""

    masks: Masks
    fold: Any  # None is everywhere
    keep: Any
    final_fold: Any
    final_keep: Any


def _seen(plan: TpuPlan, n: Any, refs: Refs) -> _Seen:
    if plan.aligned:
        return _Seen(_aligned_masks(plan, n), None, None, None, None)
    rows, back = plan.rows, plan.back
    fields = refs["fields"][0, 0]
    columns = fields.T
    field = lambda i: fields[i : i + 1]  # noqa: E731
    own = lambda i: columns[back:, i : i + 1]  # noqa: E731
    run = own(wl.QUERY_RUN)
    same = run == field(wl.KEY_RUN)
    past = _distance(plan) >= 0
    within = field(wl.POSITION) >= own(wl.START)
    masks = Masks(
        near=same & past & within,
        far=same & past & ~within,
        band=run == field(wl.VALUE_RUN),
        own=run == own(wl.STATE_RUN),
    )
    keep = fields[wl.KEEP : wl.KEEP + 1]
    seen = _Seen(masks, columns[:rows, wl.FOLD : wl.FOLD + 1] > 0, keep[:, :1] > 0, None, None)
    if not plan.final:
        return seen
    final = columns[rows:, wl.FOLD : wl.FOLD + 1] > 0
    return seen._replace(final_fold=final, final_keep=keep[:, rows : rows + 1] > 0)


def _distance(plan: TpuPlan) -> Array:
    shape = (plan.rows, plan.slots)
    query = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + plan.back
    return query - jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _aligned_masks(plan: TpuPlan, n: Any) -> Masks:
    """Groups are counted from the row's first token."""
    G, R, back = plan.group_size, plan.local_groups, plan.back
    first = n * plan.rows
    inside = jax.lax.rem(first, G)
    # Counted from the start of the group of the block's first token.
    query = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, 1), 0) + inside
    slot = jax.lax.broadcasted_iota(jnp.int32, (1, plan.slots), 1) - back
    start = (_quotient(query, G) - (R - 1)) * G
    within = slot + inside >= start
    past = _distance(plan) >= 0
    known = slot + first >= 0
    return Masks(near=past & within & known, far=past & ~within, band=None, own=None)


def _quotient(x: Array, divisor: int) -> Array:
    """floor(x / divisor) of small integers: vectors of integers have no division."""
    return jnp.floor((x.astype(jnp.float32) + 0.5) * (1 / divisor)).astype(jnp.int32)


def _queries(plan: TpuPlan, refs: Refs, i: int, keep_inside: Callable[[Array], Array]) -> tuple[Array, Array | None]:
    """Queries of a head as they are given."""
    s = plan.sizes
    own = refs.get("grouped_query")
    grouped = None if own is None else keep_inside(own[0, :, _lanes(i, s.P)])
    return keep_inside(refs["query"][0, :, _lanes(i, s.D)]), grouped


def _skew(plan: TpuPlan, line: Array) -> Array:
    """The band [rows, slots] of a line [1, period]: row i is the line moved by i. Row by row where bits of i are 1."""
    x = jnp.broadcast_to(line, (plan.rows, plan.period))
    return _move_rows(plan, x, lambda step: step)[:, : plan.slots]


def _unskew(plan: TpuPlan, band: Array) -> Array:
    """The adjoint of `_skew`."""
    beyond = jnp.zeros((plan.rows, plan.period - plan.slots), jnp.float32)
    x = _move_rows(plan, jnp.concatenate([band, beyond], axis=1), lambda step: plan.period - step)
    return jnp.sum(x, axis=0, keepdims=True)


def _move_rows(plan: TpuPlan, x: Array, move: Callable[[int], int]) -> Array:
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    step = 1
    while step < plan.rows:
        x = jnp.where(row & step != 0, pltpu.roll(x, move(step), 1), x)
        step *= 2
    return x


def _make_bands(plan: TpuPlan, refs: Refs) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        for name in ("bias", "taps"):
            for i in range(plan.heads * plan.sizes.J) if name in refs else ():
                refs[f"{name}_band"][i] = _skew(plan, refs[name][i])


def _bands(refs: Refs, i: int) -> Bands:
    return Bands(*(refs[f"{name}_band"][i] if name in refs else None for name in ("bias", "taps")))


def _put_window(plan: TpuPlan, n: Any, refs: Refs) -> None:
    """Puts the block's keys and values behind those that are kept; at the first block, what goes before the row."""
    s, form, back = plan.sizes, plan.form, plan.back
    keep_inside = functools.partial(_inside, plan, n)

    def put(where: slice, kp: int, key: Array, grouped_key: Array | None, value: Array) -> None:
        local, grouped = chunk.operand(form, key, grouped_key)
        if local is not None:
            refs["key_window"][where, _lanes(kp, s.D)] = local
        if grouped is not None and not form.shared:
            refs["grouped_key_window"][where, _lanes(kp, s.state_rows)] = grouped
        refs["value_window"][where, _lanes(kp, s.E)] = value

    @pl.when(n == 0)
    def _():
        if form.grouped:
            refs["state_sum"][...] = refs["state"][0] if "state" in refs else jnp.zeros_like(refs["state_sum"])
        for name in ("key_window", "grouped_key_window", "value_window"):
            if name in refs and back and plan.fresh:
                refs[name][:back] = jnp.zeros((back, refs[name].shape[1]), refs[name].dtype)
        if back and not plan.fresh:
            own = refs.get("grouped_key_before")
            for kp in range(plan.heads):
                grouped = None if own is None else own[0, :, _lanes(kp, s.P)]
                key, value = refs["key_before"][0, :, _lanes(kp, s.D)], refs["value_before"][0, :, _lanes(kp, s.E)]
                put(slice(0, back), kp, key, grouped, value)

    own = refs.get("grouped_key")
    for kp in range(plan.heads):
        grouped = None if own is None else keep_inside(own[0, :, _lanes(kp, s.P)])
        key, value = keep_inside(refs["key"][0, :, _lanes(kp, s.D)]), keep_inside(refs["value"][0, :, _lanes(kp, s.E)])
        put(slice(back, plan.slots), kp, key, grouped, value)


class _Window(NamedTuple):
    """Of one key/value head: keys as they are multiplied, values, and the state before them."""

    key: Any
    grouped_key: Any  # None where the branch is off, as its state
    value: Array
    state: Any


def _window(plan: TpuPlan, refs: Refs, kp: int) -> _Window:
    s, form = plan.sizes, plan.form
    key = refs["key_window"][:, _lanes(kp, s.D)] if form.scored else None
    grouped = None
    if form.grouped:
        grouped = key if form.shared else refs["grouped_key_window"][:, _lanes(kp, s.state_rows)]
    state = refs["state_sum"][kp] if form.grouped else None
    return _Window(key, grouped, refs["value_window"][:, _lanes(kp, s.E)], state)


def _advance(plan: TpuPlan, refs: Refs, seen: _Seen) -> None:
    """Folds the first tokens of the window into the state, and moves it on."""
    rows, back = plan.rows, plan.back
    if plan.form.grouped:
        for kp in range(plan.heads):
            window = _window(plan, refs, kp)
            state = window.state if seen.keep is None else jnp.where(seen.keep, window.state, 0.0)
            refs["state_sum"][kp] = state + chunk.fold(window.grouped_key[:rows], window.value[:rows], seen.fold)
            if "state_out" in refs:
                _put_final(plan, refs, seen, kp, window)
    for name in ("key_window", "grouped_key_window", "value_window"):
        if name in refs and back:
            refs[name][:back] = refs[name][rows:]


def _put_final(plan: TpuPlan, refs: Refs, seen: _Seen, kp: int, window: _Window) -> None:
    @pl.when(pl.program_id(2) == plan.blocks - 1)
    def _():
        state, rows = refs["state_sum"][kp], plan.rows
        rest = chunk.fold(window.grouped_key[rows:], window.value[rows:], seen.final_fold)
        refs["state_out"][0, kp] = jnp.where(seen.final_keep, state, 0.0) + rest


def forward_body(plan: TpuPlan, refs: Refs) -> None:
    """Outputs of a block; blocks come in the order of the row."""
    n, s = pl.program_id(2), plan.sizes
    _put_window(plan, n, refs)
    _make_bands(plan, refs)
    seen = _seen(plan, n, refs)
    for kp in range(plan.heads):
        window = _window(plan, refs, kp)
        for i in range(kp * s.J, (kp + 1) * s.J):
            query = chunk.operand(plan.form, *_queries(plan, refs, i, lambda x: x))
            x = BlockOperands(query[0], window.key, query[1], window.grouped_key)
            y = chunk.attend(plan.form, x, window.value, window.state, refs["alpha"][i], seen.masks, _bands(refs, i))
            refs["y_out"][0, :, _lanes(i, s.E)] = y.astype(refs["y_out"].dtype)
    _advance(plan, refs, seen)


def query_body(plan: TpuPlan, refs: Refs) -> None:
    """Gradients of a block's queries, and sums of those of alpha and bands; blocks come in the order of the row."""
    n, heads = pl.program_id(2), plan.heads * plan.sizes.J
    _put_window(plan, n, refs)
    _make_bands(plan, refs)
    seen = _seen(plan, n, refs)

    @pl.when(n == 0)
    def _():
        for name in ("alpha_out", "bias_sum", "taps_sum"):
            if name in refs:
                refs[name][...] = jnp.zeros_like(refs[name])

    for kp in range(plan.heads):
        window = _window(plan, refs, kp)
        for i in range(kp * plan.sizes.J, (kp + 1) * plan.sizes.J):
            _put_query_gradients(plan, n, refs, seen, i, window)
    _advance(plan, refs, seen)

    @pl.when(n == plan.blocks - 1)
    def _():
        for name in ("bias", "taps"):
            for i in range(heads) if name in refs else ():
                refs[f"{name}_out"][0, i] = _unskew(plan, refs[f"{name}_sum"][i])


def _put_query_gradients(plan: TpuPlan, n: Any, refs: Refs, seen: _Seen, i: int, window: _Window) -> None:
    """Of one query head."""
    s, keep_inside = plan.sizes, functools.partial(_inside, plan, n)
    given = _queries(plan, refs, i, keep_inside)
    query = chunk.operand(plan.form, *given)
    x = BlockOperands(query[0], window.key, query[1], window.grouped_key)
    y, alpha = keep_inside(refs["y"][0, :, _lanes(i, s.E)]), refs["alpha"][i]
    g = chunk.query_gradients(plan.form, x, window.value, window.state, alpha, seen.masks, _bands(refs, i), y)
    local, grouped = chunk.operand_gradients(plan.form, *given, g.query, g.grouped_query)
    refs["query_out"][0, :, _lanes(i, s.D)] = local.astype(refs["query_out"].dtype)
    if grouped is not None:
        refs["grouped_query_out"][0, :, _lanes(i, s.P)] = grouped.astype(refs["grouped_query_out"].dtype)
    if g.alpha is not None:
        refs["alpha_out"][0, i] += g.alpha
    for name, of_band in (("bias_sum", g.bias), ("taps_sum", g.taps)):
        if of_band is not None:
            refs[name][i] += of_band


def _whole_window(plan: TpuPlan, n: Any, refs: Refs, name: str, lanes: slice) -> Array:
    """Keys or values of the window as they are given, in reverse order of blocks: earlier ones are read again."""
    parts = []
    for piece in range(plan.pieces):
        first = n * (plan.rows // plan.piece) - plan.pieces + piece
        x = refs[f"{name}_{piece}"][0, :, lanes]
        before = jnp.zeros_like(x) if plan.fresh else refs[f"{name}_before_{piece}"][0, :, lanes]
        parts.append(jnp.where(first >= 0, x, before))
    parts.append(_inside(plan, n, refs[name][0, :, lanes]))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


_SUMS = ("key_sum", "grouped_key_sum", "value_sum")


def key_body(plan: TpuPlan, refs: Refs) -> None:
    """Gradients of a block's keys and values, and of what goes before the row; blocks come in reverse order."""
    s, rows = plan.sizes, plan.rows
    n = plan.blocks - 1 - pl.program_id(2)
    _make_bands(plan, refs)
    seen = _seen(plan, n, refs)

    @pl.when(pl.program_id(2) == 0)
    def _():
        for name in (*_SUMS, "state_sum"):
            refs[name][...] = jnp.zeros_like(refs[name])

    for kp in range(plan.heads):
        lanes = (_lanes(kp, s.D), _lanes(kp, s.state_rows), _lanes(kp, s.E))
        key = _whole_window(plan, n, refs, "key", lanes[0])
        own = _whole_window(plan, n, refs, "grouped_key", lanes[1]) if "grouped_key" in refs else None
        value = _whole_window(plan, n, refs, "value", lanes[2])
        operand: tuple[Any, Any] = chunk.operand(plan.form, key, own)
        if plan.form.grouped:
            _add_fold_gradients(plan, refs, seen, kp, operand[1], value, lanes)
        for i in range(kp * s.J, (kp + 1) * s.J):
            query = chunk.operand(plan.form, *_queries(plan, refs, i, functools.partial(_inside, plan, n)))
            x = BlockOperands(query[0], operand[0], query[1], operand[1])
            _add_key_gradients(plan, n, refs, seen, i, x, value, lanes)
        _put_key_gradients(plan, refs, kp, key, own, lanes)
    for name in _SUMS:
        if plan.back:
            refs[name][rows:] = refs[name][: plan.back]
        refs[name][:rows] = jnp.zeros((rows, refs[name].shape[1]), jnp.float32)


def _add_key_gradients(
    plan: TpuPlan,
    n: Any,
    refs: Refs,
    seen: _Seen,
    i: int,
    x: BlockOperands,
    value: Array,
    lanes: tuple[slice, slice, slice],
) -> None:
    """Adds what one query head gives to its window and to the state before it."""
    y = _inside(plan, n, refs["y"][0, :, _lanes(i, plan.sizes.E)])
    g = chunk.key_gradients(plan.form, x, value, refs["alpha"][i], seen.masks, _bands(refs, i), y)
    for name, gradient, where in zip(_SUMS, g[:3], lanes, strict=True):
        if gradient is not None:
            refs[name][:, where] += gradient
    if g.state is not None:
        refs["state_sum"][i // plan.sizes.J] += g.state


def _add_fold_gradients(
    plan: TpuPlan, refs: Refs, seen: _Seen, kp: int, grouped_key: Array, value: Array, lanes: tuple[slice, slice, slice]
) -> None:
    """The gradients of what was folded after the block, and the step of `state_sum` to the state before it."""
    rows = plan.rows

    def add(which: slice, mask: Array | None, gradient: Array) -> None:
        key, values = chunk.fold_gradients(grouped_key[which], value[which], mask, gradient)
        refs["grouped_key_sum"][which, lanes[1]] += key
        refs["value_sum"][which, lanes[2]] += values

    if plan.final:

        @pl.when(pl.program_id(2) == 0)
        def _():
            final = refs["final"][0, kp]
            add(slice(rows, plan.slots), seen.final_fold, final)
            refs["state_sum"][kp] = jnp.where(seen.final_keep, final, 0.0)

    gradient = refs["state_sum"][kp]
    add(slice(0, rows), seen.fold, gradient)
    if seen.keep is not None:
        refs["state_sum"][kp] = jnp.where(seen.keep, gradient, 0.0)


def _put_key_gradients(
    plan: TpuPlan, refs: Refs, kp: int, key: Array, own: Array | None, lanes: tuple[slice, slice, slice]
) -> None:
    """Writes the gradients that are complete: of the block, and after the first block of what goes before the row."""
    form, back = plan.form, plan.back

    def put(which: slice, suffix: str) -> None:
        local = refs["key_sum"][which, lanes[0]] if form.scored else None
        grouped = refs["grouped_key_sum"][which, lanes[1]] if form.grouped else None
        of_key, of_own = chunk.operand_gradients(form, key[which], None if own is None else own[which], local, grouped)
        refs[f"key{suffix}"][0, :, lanes[0]] = of_key.astype(refs[f"key{suffix}"].dtype)
        if of_own is not None:
            refs[f"grouped_key{suffix}"][0, :, lanes[1]] = of_own.astype(refs[f"grouped_key{suffix}"].dtype)
        refs[f"value{suffix}"][0, :, lanes[2]] = refs["value_sum"][which, lanes[2]].astype(refs[f"value{suffix}"].dtype)

    put(slice(back, plan.slots), "_out")
    if not plan.fresh:

        @pl.when(pl.program_id(2) == plan.blocks - 1)
        def _():
            if back:
                put(slice(0, back), "_before_out")
            if "state_out" in refs:
                refs["state_out"][0, kp] = refs["state_sum"][kp]
