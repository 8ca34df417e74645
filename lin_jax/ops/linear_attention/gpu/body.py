"""The bodies of the GPU kernels: what one program reads, computes with `chunk.py`, and writes.

Four kernels, each one program a batch row, head, part of the row and value tile (`GpuPlan`):

- `sums_kernel`: what the tokens of a part add to the state (or, backward, to its gradient).
- `forward_kernel`: blocks of queries in order, with the state on the chip.
- `query_gradients_kernel`: the same order; gradients of queries, alpha, bias and filter. States are recomputed.
- `key_gradients_kernel`: blocks of keys in reverse order, with the gradient of the state on the chip.

Values wider than a tile make the gradients of queries and keys sums over tiles. Those of the local branch then come
from kernels that go through all tiles for every pair of blocks; those of the grouped branch, which needs the state of
its tile, are summed over programs.
"""

# Letters beyond the legend: A = tokens that may be seen: those that a state remembers, then the row's; I = value
# tiles; Z = parts of a row.

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from lin_jax.ops.linear_attention import chunk
from lin_jax.ops.linear_attention.chunk import Form
from lin_jax.ops.linear_attention.gpu import triton
from lin_jax.ops.linear_attention.gpu.blocks import GpuPlan, Kinds, padded


class Floats(NamedTuple):
    """The arguments that have gradients. Tables by distance have their heads first: Triton reads rows of them."""

    q_BTHD: Array
    k_BAKD: Array
    v_BAKE: Array
    grouped_q_BTHP: Array | None
    grouped_k_BAKP: Array | None
    alpha_H: Array
    bias_HX: Array | None
    taps_HW: Array | None
    state_BKPE: Array | None


class Layout(NamedTuple):
    """Where every key token stands, int32 [B, A]. A run of -1 is never seen.

    Attributes:
        run: sequence that the token belongs to, padding counting as one.
        key_run: the same for keys of the window, -1 where the key is unknown.
        value_run: the same for values and queries.
        position: in the sequence.
    """

    run: Array
    key_run: Array
    value_run: Array
    position: Array


class Extra(NamedTuple):
    """What some kernels read besides: states at the starts of parts, and in backward passes these."""

    state_BZKPE: Any = None
    y_gradient_BTHE: Any = None
    log_total_BHT: Any = None
    delta_BHT: Any = None


class Refs(NamedTuple):
    """References to `Floats`, `Layout` and `Extra`; None where there is no such array."""

    floats: Any
    layout: Any
    extra: Any


# A program's view of the arrays.


@dataclasses.dataclass(frozen=True)
class _Program:
    """What one program of a kernel reads: a row b, a query head and a key head, and all static facts.

    `zero` is 0 as a value of the program: Pallas refuses static slices that end beyond an axis, and those are masked.
    """

    plan: GpuPlan
    refs: Refs
    b: Any
    head: Any
    key_head: Any
    zero: Any

    def tile_of(self, ref: Any, start: Any, head: Any, column: Any, columns: int) -> Array:
        """[rows, columns] of an array [B, tokens, heads, channels] from a token and channel on; 0 beyond its ends."""
        _, tokens, _, channels = ref.shape
        rows = self.plan.rows
        token = start + jax.lax.iota(jnp.int32, rows)
        mask = ((token >= 0) & (token < tokens))[:, None]
        if channels % columns:
            mask &= (column + jax.lax.iota(jnp.int32, columns) < channels)[None]
        at = ref.at[self.b, pl.ds(start, rows), head, pl.ds(column, columns)]
        return triton.load(at, mask=mask, other=0)

    def query_rows(self, ref: Any, i: Any, column: Any, columns: int, head: Any = None) -> Array:
        """Rows of block i of an array of queries."""
        head = self.head if head is None else head
        return self.tile_of(ref, i * self.plan.rows - self.plan.context, head, column, columns)

    def key_rows(self, ref: Any, j: Any, column: Any, columns: int) -> Array:
        """Rows of block j of an array of keys."""
        return self.tile_of(ref, j * self.plan.rows, self.key_head, column, columns)

    def raw_queries(self, i: Any, head: Any = None) -> tuple[Array, Array | None]:
        """Queries of block i, and those of the grouped branch where it has its own, as they were given."""
        floats, plan = self.refs.floats, self.plan
        q = self.query_rows(floats.q_BTHD, i, self.zero, padded(plan.size), head)
        if floats.grouped_q_BTHP is None:
            return q, None
        return q, self.query_rows(floats.grouped_q_BTHP, i, self.zero, padded(plan.grouped_size), head)

    def raw_keys(self, j: Any) -> tuple[Array, Array | None]:
        """Keys of block j, and those of the grouped branch where it has its own, as they were given."""
        floats, plan = self.refs.floats, self.plan
        k = self.key_rows(floats.k_BAKD, j, self.zero, padded(plan.size))
        if floats.grouped_k_BAKP is None:
            return k, None
        return k, self.key_rows(floats.grouped_k_BAKP, j, self.zero, padded(plan.grouped_size))

    def operands(self, x: Array, grouped: Array | None) -> tuple[Array | None, Array | None]:
        """As they are multiplied, in the local and in the grouped branch."""
        local, mapped = chunk.operand(self.plan.form, x, grouped)
        if mapped is not None and not chunk.MAPS[self.plan.form.feature_map].keeps_zero:
            channel = jax.lax.iota(jnp.int32, mapped.shape[1])
            mapped = jnp.where((channel < self.plan.grouped_size)[None], mapped, jnp.zeros_like(mapped))
        return local, mapped

    def values(self, j: Any, tile: Any) -> Array:
        """Values of block j in a value tile."""
        return self.key_rows(self.refs.floats.v_BAKE, j, tile * self.plan.tile, self.plan.tile)

    def y_gradient(self, i: Any, tile: Any, head: Any = None) -> Array:
        """Gradient of the outputs of block i in a value tile."""
        return self.query_rows(self.refs.extra.y_gradient_BTHE, i, tile * self.plan.tile, self.plan.tile, head)

    def alpha(self, head: Any = None) -> Array:
        """The weight of the grouped branch."""
        return triton.load(self.refs.floats.alpha_H.at[self.head if head is None else head])

    def per_query(self, ref: Any, i: Any, head: Any, otherwise: float) -> Array:
        """[rows] of an array [B, H, T]."""
        token = i * self.plan.rows - self.plan.context + jax.lax.iota(jnp.int32, self.plan.rows)
        mask = (token >= 0) & (token < self.plan.tokens)
        at = ref.at[self.b, head, pl.ds(i * self.plan.rows - self.plan.context, self.plan.rows)]
        return triton.load(at, mask=mask, other=otherwise)

    def place(self, ref: Any, j: Any) -> Array:
        """[rows] of an array of the layout, -1 beyond its end."""
        token = j * self.plan.rows + jax.lax.iota(jnp.int32, self.plan.rows)
        mask = (token >= 0) & (token < ref.shape[1])
        return triton.load(ref.at[self.b, pl.ds(j * self.plan.rows, self.plan.rows)], mask=mask, other=-1)

    def run_at(self, token: Any) -> Array:
        """The run of one key token: run 0 before the first, that of the last after it."""
        ref = self.refs.layout.run
        run = triton.load(ref.at[self.b, jnp.clip(token, 0, ref.shape[1] - 1)])
        return jnp.where(token < 0, 0, run)

    def by_distance(self, ref: Any, distance: Array, head: Any) -> Array:
        """Entries of a table [H, X] at distances [rows, rows]; 0 outside it."""
        X = ref.shape[1]
        mask = (distance >= 0) & (distance < X)
        return triton.load(ref.at[head, jnp.clip(distance, 0, X - 1)], mask=mask, other=0)


class _Tables(NamedTuple):
    """Entries by distance of a pair of blocks, float32 [rows, rows]; None where there is none."""

    bias: Any
    taps: Any


class _Pair(NamedTuple):
    """Which entries [rows, rows] of a block of queries and one of keys belong to which branch.

    `kinds` says which branches have any; the masks are None where all entries are theirs.
    """

    kinds: Kinds
    near: Any
    far: Any
    band: Any

    @property
    def has_near(self) -> bool:
        """Whether any entry is of the local branch."""
        return self.kinds.near != "none"

    @property
    def has_far(self) -> bool:
        """Whether any entry is of the grouped branch."""
        return self.kinds.far != "none"

    @property
    def empty(self) -> bool:
        """Whether there are no entries at all."""
        return not (self.has_near or self.has_far or self.kinds.band)


def _tables(program: _Program, i: Any, j: Any, offset: int | None, head: Any) -> _Tables:
    plan, floats = program.plan, program.refs.floats
    kinds = plan.kinds(offset)
    index = jax.lax.iota(jnp.int32, plan.rows)
    distance = (i - j) * plan.rows + index[:, None] - index[None]
    return _Tables(
        bias=program.by_distance(floats.bias_HX, distance, head) if kinds.near != "none" and plan.bias else None,
        taps=program.by_distance(floats.taps_HW, distance, head) if kinds.band else None,
    )


def _pair(program: _Program, i: Any, j: Any, offset: int | None) -> _Pair:
    plan = program.plan
    kinds = plan.kinds(offset)
    index = jax.lax.iota(jnp.int32, plan.rows)
    q_index, k_index = (i * plan.rows + index)[:, None], (j * plan.rows + index)[None]
    q_position, k_position = q_index, k_index
    past = q_index >= k_index if offset is None or offset == 0 else None
    seen, in_band = past, None  # Tables hold 0 beyond their ends.
    if not plan.aligned:
        layout = program.refs.layout
        q_run = program.place(layout.value_run, i)[:, None]
        seen = _and(past, (q_run == program.place(layout.key_run, j)[None]) & (q_run >= 0))
        in_band = (q_run == program.place(layout.value_run, j)[None]) & (q_run >= 0)
        q_position = program.place(layout.position, i)[:, None]
        k_position = program.place(layout.position, j)[None]
    elif plan.form.local == "softmax" and past is None:
        seen = k_index >= 0  # Other activations of what is not there meet values of 0.
    if offset is None and (plan.lag is None or plan.band_lag > plan.lag):
        seen = _and(seen, j >= _lowest(plan, i))  # The convolution reaches blocks that are in the state already.
    groups = _group(q_position, plan) - _group(k_position, plan)
    return _Pair(
        kinds,
        near=seen if kinds.near == "all" else _and(seen, groups < plan.local_groups),
        far=seen if kinds.far == "all" else _and(seen, groups >= plan.local_groups),
        band=in_band,
    )


def _and(a: Array | None, b: Array) -> Array:
    return b if a is None else a & b


def _group(position: Array, plan: GpuPlan) -> Array:
    return jax.lax.div(position, jnp.int32(plan.group_size))


class _Queries(NamedTuple):
    """A block of queries: as given, and as they are multiplied."""

    raw: Array
    raw_grouped: Any
    local: Any
    grouped: Any


class _Keys(NamedTuple):
    """A block of keys, likewise."""

    raw: Array
    raw_grouped: Any
    local: Any
    grouped: Any


def _queries(program: _Program, i: Any, head: Any = None) -> _Queries:
    raw = program.raw_queries(i, head)
    return _Queries(*raw, *program.operands(*raw))


def _keys(program: _Program, j: Any) -> _Keys:
    raw = program.raw_keys(j)
    return _Keys(*raw, *program.operands(*raw))


class _Weights(NamedTuple):
    """Float32 [rows, rows] of a pair of blocks: scores, a of them, and the sum of all branches; None: none at all."""

    score: Any
    local: Any
    total: Any


def _score(form: Form, product: Array, tables: _Tables) -> Array:
    score = product * form.score_scale
    return score if tables.bias is None else score + tables.bias


def _weights(form: Form, q: _Queries, k: _Keys, pair: _Pair, tables: _Tables, alpha: Any, log_total: Any) -> _Weights:
    score = local = product = None
    terms = []
    if pair.has_near:
        product = chunk.times_transposed(q.local, k.local)
        score = _score(form, product, tables)
        if form.local == "softmax":
            local = _where(pair.near, jnp.exp(score - log_total[:, None]))
        else:
            local = chunk.ACTIVATIONS[form.local].weights(score, pair.near)
        terms.append(local)
    if pair.has_far:
        if product is None or not form.shared:
            product = chunk.times_transposed(q.grouped, k.grouped)
        terms.append(_where(pair.far, alpha * product))
    if pair.kinds.band:
        terms.append(_where(pair.band, tables.taps.astype(jnp.float32)))
    return _Weights(score, local, sum(terms[1:], terms[0]) if terms else None)


def _score_gradient(form: Form, weights: _Weights, pair: _Pair, gradient: Array, delta: Any) -> Array:
    """Gradient of the scores from that of the weights; `delta` is softmax's sum of weight gradient over the window."""
    if form.local == "softmax":
        return weights.local * (gradient - delta[:, None])
    return chunk.ACTIVATIONS[form.local].gradient(weights.score, weights.local, pair.near, gradient)


# Going through blocks. Windows of up to UNROLLED earlier blocks are written out, longer ones are a loop.

UNROLLED = 1


def _lowest(plan: GpuPlan, i: Any) -> Any:
    """The first block that queries of block i see one by one: the state holds those before it."""
    if plan.lag is not None:
        return jnp.maximum(0, i - plan.lag)
    blocks = plan.group_size // plan.rows
    group = (jax.lax.div(i, jnp.int32(blocks)) - plan.local_groups + 1) * blocks
    return jnp.maximum(0, group)


def _highest(plan: GpuPlan, j: Any) -> Any:
    """The last block whose queries see keys of block j one by one."""
    if plan.lag is not None:
        return jnp.minimum(plan.blocks - 1, j + plan.lag)
    blocks = plan.group_size // plan.rows
    group = (jax.lax.div(j, jnp.int32(blocks)) + plan.local_groups) * blocks - 1
    return jnp.minimum(plan.blocks - 1, group)


def _unrolled(plan: GpuPlan) -> list[int]:
    """The offsets of a window that is written out, the earliest block first; empty for a loop."""
    return list(range(plan.reach, -1, -1)) if plan.lag is not None and plan.reach <= UNROLLED else []


def _over_keys(plan: GpuPlan, i: Any, body: Any, carry: Any) -> Any:
    """`body(j, offset, carry)` for the blocks j that queries of block i see."""
    for offset in _unrolled(plan):
        carry = body(i - offset, offset, carry)
    if _unrolled(plan):
        return carry
    first = jnp.maximum(0, jnp.minimum(_lowest(plan, i), i - plan.band_lag))
    return jax.lax.fori_loop(first, i + 1, lambda j, carry: body(j, None, carry), carry)


def _over_queries(plan: GpuPlan, j: Any, body: Any, carry: Any) -> Any:
    """`body(i, offset, carry)` for the blocks i whose queries see keys of block j."""
    for offset in _unrolled(plan):
        carry = body(j + offset, offset, carry)
    if _unrolled(plan):
        return carry
    first = jnp.maximum(j, plan.first_query)
    last = jnp.minimum(plan.blocks - 1, jnp.maximum(_highest(plan, j), j + plan.band_lag))
    return jax.lax.fori_loop(first, last + 1, lambda i, carry: body(i, None, carry), carry)


def _over_heads(program: _Program, body: Any, carry: Any) -> Any:
    """`body(head, carry)` for the query heads of the program's key head."""
    sharing = program.plan.sharing
    first = program.key_head * sharing
    if sharing == 1:
        return body(first, carry)
    return jax.lax.fori_loop(first, first + sharing, body, carry)


def _part(blocks: int, parts: int, first: int, part: Any) -> tuple[Any, Any]:
    """First and last + 1 block of a part, of `blocks` that begin with block `first`."""
    each = -(-blocks // parts)
    return first + part * each, jnp.minimum(first + (part + 1) * each, first + blocks)


class _State(NamedTuple):
    """A state [P, a value tile], float32, and the run that it belongs to; None without grouped branch, or aligned."""

    state: Any
    run: Any


def _fold_keys(program: _Program, before: _State, j: Any, grouped_key: Array, value: Array) -> _State:
    """The state after block j of keys."""
    plan = program.plan
    if plan.aligned:
        return _State(before.state + chunk.fold(grouped_key, value, None), None)
    run = program.run_at((j + 1) * plan.rows - 1)
    mask = program.place(program.refs.layout.key_run, j) == run
    kept = jnp.where(run == before.run, before.state, 0.0)
    return _State(kept + chunk.fold(grouped_key, value, mask[:, None]), run)


def _before_queries(program: _Program, after: _State, i: Any) -> tuple[_State, Array | None]:
    """What of a state's gradient the run of block i's first query keeps, and which queries are of that run."""
    if program.plan.aligned:
        return after, None
    run = program.run_at(i * program.plan.rows)
    mask = program.place(program.refs.layout.value_run, i) == run
    return _State(jnp.where(run == after.run, after.state, 0.0), run), mask[:, None]


def _fold_head(program: _Program, state: Array, grouped: Array, y_gradient: Array, mask: Any, head: Any) -> Array:
    """The gradient of the state with a block of queries of one head."""
    weighted = program.alpha(head) * y_gradient.astype(jnp.float32)
    return state + chunk.fold(grouped, weighted.astype(grouped.dtype), mask)


def _fold_queries(program: _Program, after: _State, i: Any, tile: Any) -> _State:
    """The gradient of the state before block i of queries, of all heads that share it."""
    kept, mask = _before_queries(program, after, i)

    def fold(head: Any, state: Array) -> Array:
        return _fold_head(
            program, state, _queries(program, i, head).grouped, program.y_gradient(i, tile, head), mask, head
        )

    return _State(_over_heads(program, fold, kept.state), kept.run)


def _own(program: _Program, run_ref: Any, block: Any, state: _State) -> Array | None:
    """[rows, 1]: whether tokens of a block are of the state's sequence; None: all are."""
    return None if program.plan.aligned else (program.place(run_ref, block) == state.run)[:, None]


def _where(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def _first_state(program: _Program, part: Any, tile: Any, run: Any) -> _State:
    """The state where a part starts: entry `part` of `state_BZKPE`, or 0 where there is none."""
    plan, ref = program.plan, program.refs.extra.state_BZKPE
    if not plan.form.grouped:
        return _State(None, None)
    if ref is None:
        state = jnp.zeros((padded(plan.grouped_size), plan.tile), jnp.float32)
    else:
        at, mask = _state_at(program, ref, jnp.clip(part, 0, ref.shape[1] - 1), tile)
        mask &= (part >= 0) & (part < ref.shape[1])
        state = triton.load(at, mask=mask, other=0)
    return _State(state, None if plan.aligned else run)


def _state_at(program: _Program, ref: Any, part: Any, tile: Any) -> tuple[Any, Array]:
    """A state's place in an array [B, Z, K, P, E], and the mask of what exists there."""
    P, E = ref.shape[3:]
    rows, columns = padded(P), program.plan.tile
    row, column = jax.lax.iota(jnp.int32, rows), tile * columns + jax.lax.iota(jnp.int32, columns)
    at = ref.at[program.b, part, program.key_head, pl.ds(program.zero, rows), pl.ds(tile * columns, columns)]
    return at, (row < P)[:, None] & (column < E)[None]


def _store(
    program: _Program, ref: Any, start: Any, head: Any, column: Any, x: Array, lead: tuple[Any, ...] = ()
) -> None:
    """Writes rows of an array [..., B, tokens, heads, channels] from a token and channel on, as far as they exist."""
    tokens, channels = ref.shape[-3], ref.shape[-1]
    rows, columns = x.shape
    token = start + jax.lax.iota(jnp.int32, rows)
    mask = ((token >= 0) & (token < tokens))[:, None]
    mask &= (column + jax.lax.iota(jnp.int32, columns) < channels)[None]
    at = ref.at[*lead, program.b, pl.ds(start, rows), head, pl.ds(column, columns)]
    triton.store(at, x.astype(ref.dtype), mask=mask)


# The kernels.


def _program_of_query_head(plan: GpuPlan, refs: Refs) -> tuple[_Program, Any, Any]:
    b, head, part, tile = (pl.program_id(axis) for axis in range(4))
    return _Program(plan, refs, b, head, jax.lax.div(head, jnp.int32(plan.sharing)), b * 0), part, tile


def _program_of_key_head(plan: GpuPlan, refs: Refs) -> tuple[_Program, Any, Any]:
    b, key_head, part, tile = (pl.program_id(axis) for axis in range(4))
    return _Program(plan, refs, b, None, key_head, b * 0), part, tile


def sums_kernel(plan: GpuPlan, parts: int, reverse: bool, refs: Refs, sums_ref: Any) -> None:
    """What a part adds to the state of the next, or (reverse) what the next adds to the gradient of this one's."""
    program, part, tile = _program_of_key_head(plan, refs)
    state = _State(
        jnp.zeros((padded(plan.grouped_size), plan.tile), jnp.float32), None if plan.aligned else jnp.int32(-3)
    )
    if reverse:
        first, last = _part(plan.blocks, parts, 0, part + 1)
        start, stop = _highest(plan, first - 1) + 1, _highest(plan, last - 1) + 1
        fold = lambda n, state: _fold_queries(program, state, stop - 1 - (n - start), tile)  # noqa: E731
    else:
        first, last = _part(plan.blocks - plan.first_query, parts, plan.first_query, part)
        start, stop = _lowest(plan, first), _lowest(plan, last)

        def fold(j: Any, state: _State) -> _State:
            return _fold_keys(program, state, j, _keys(program, j).grouped, program.values(j, tile))

    total = jax.lax.fori_loop(start, stop, fold, state)
    at, mask = _state_at(program, sums_ref, part, tile)
    triton.store(at, total.state, mask=mask)


def _log_totals(program: _Program, i: Any, q: _Queries, tables: Any, keys: Any) -> Array:
    """Logarithm of softmax's denominator [rows]; infinite for queries that see nothing."""
    form, lowest = program.plan.form, jnp.finfo(jnp.float32).min

    def body(j: Any, offset: int | None, carry: Any) -> Any:
        pair = _pair(program, i, j, offset)
        if not pair.has_near:
            return carry
        top, total = carry
        score = _score(form, chunk.times_transposed(q.local, keys(j, offset).local), tables(j, offset))
        new = jnp.maximum(top, jnp.max(score if pair.near is None else jnp.where(pair.near, score, lowest), axis=1))
        weight = _where(pair.near, jnp.exp(score - new[:, None]))
        return new, total * jnp.exp(top - new) + jnp.sum(weight, axis=1)

    rows = program.plan.rows
    first = jnp.full((rows,), lowest, jnp.float32), jnp.zeros((rows,), jnp.float32)
    top, total = _over_keys(program.plan, i, body, first)
    return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), jnp.inf)


def _window_tables(program: _Program, head: Any) -> Any:
    """A function (i, j, offset) -> tables; those of a window that is written out are read once, before the loop."""
    known = {offset: _narrow(program, _tables(program, offset, 0, offset, head)) for offset in _unrolled(program.plan)}
    return lambda i, j, offset: known[offset] if offset in known else _tables(program, i, j, offset, head)


def _narrow(program: _Program, tables: _Tables) -> _Tables:
    """Taps in the type of the weights that they are added to, which saves registers."""
    taps = None if tables.taps is None else tables.taps.astype(program.refs.floats.v_BAKE.dtype)
    return tables._replace(taps=taps)


def forward_kernel(plan: GpuPlan, parts: int, refs: Refs, y_ref: Any) -> None:
    """Outputs of a part, for one query head and value tile."""
    form = plan.form
    program, part, tile = _program_of_query_head(plan, refs)
    first, last = _part(plan.blocks - plan.first_query, parts, plan.first_query, part)
    alpha = program.alpha()
    tables_of = _window_tables(program, program.head)

    def block(i: Any, state: _State) -> _State:
        q = _queries(program, i)
        loaded = {offset: (_keys(program, i - offset), program.values(i - offset, tile)) for offset in _unrolled(plan)}
        keys = lambda j, offset: loaded[offset][0] if offset in loaded else _keys(program, j)  # noqa: E731
        tables = lambda j, offset: tables_of(i, j, offset)  # noqa: E731
        log_total: Any = _log_totals(program, i, q, tables, keys) if form.local == "softmax" else None

        def pair(j: Any, offset: int | None, y: Array) -> Array:
            value = loaded[offset][1] if offset in loaded else program.values(j, tile)
            pair = _pair(program, i, j, offset)
            weights = _weights(form, q, keys(j, offset), pair, tables(j, offset), alpha, log_total)
            return y if weights.total is None else y + chunk.times(weights.total.astype(value.dtype), value)

        y = jnp.zeros((plan.rows, plan.tile), jnp.float32)
        if form.grouped:
            far = alpha * chunk.times(q.grouped, state.state.astype(q.grouped.dtype))
            y = _where(None if plan.aligned else _own(program, refs.layout.value_run, i, state), far)
        y = _over_keys(plan, i, pair, y)
        if form.grouped:
            state = _fold_window(program, i, state, loaded, tile)
        _store(program, y_ref, i * plan.rows - plan.context, program.head, tile * plan.tile, y)
        return state

    run = None if plan.aligned else program.run_at(_lowest(plan, first) * plan.rows - 1)
    jax.lax.fori_loop(first, last, block, _first_state(program, _entry(program, parts, part), tile, run))


def _entry(program: _Program, parts: int, part: Any) -> Any:
    """Where `state_BZKPE` has the state of a part: the first part's is left out where it is 0."""
    ref = program.refs.extra.state_BZKPE
    return part if ref is None else part - (parts - ref.shape[1])


def _fold_window(program: _Program, i: Any, state: _State, loaded: dict[int, Any], tile: Any) -> _State:
    """The state for block i + 1 of queries: with the blocks that it sees no longer."""
    plan = program.plan
    if plan.lag is not None and plan.lag in loaded:
        keys, value = loaded[plan.lag]
        return _fold_keys(program, state, i - plan.lag, keys.grouped, value)

    def fold(j: Any, state: _State) -> _State:
        return _fold_keys(program, state, j, _keys(program, j).grouped, program.values(j, tile))

    return jax.lax.fori_loop(_lowest(plan, i), _lowest(plan, i + 1), fold, state)


class QueryOutputs(NamedTuple):
    """What `query_gradients_kernel` writes. The last two are by entry of pairs of blocks, one buffer a program."""

    q: Any
    grouped_q: Any
    alpha_BHZI: Any
    log_total_BHT: Any
    delta_BHT: Any
    bias_pairs: Any
    taps_pairs: Any


def _weight_gradient(
    program: _Program, inner: int, i: Any, j: Any, tile: Any, head: Any, given: tuple[Array, Array] | None = None
) -> Array:
    """dy v^T of a value tile, which may be given, or of all `inner` ones."""
    if inner == 1:
        y_gradient, value = given or (program.y_gradient(i, tile, head), program.values(j, tile))
        return chunk.times_transposed(y_gradient, value)

    def add(tile: Any, total: Array) -> Array:
        return total + chunk.times_transposed(program.y_gradient(i, tile, head), program.values(j, tile))

    rows = program.plan.rows
    return jax.lax.fori_loop(0, inner, add, jnp.zeros((rows, rows), jnp.float32))


def query_gradients_kernel(
    plan: GpuPlan, parts: int, inner: int, refs: Refs, zeros: Any, outputs: QueryOutputs
) -> None:
    """Gradients of queries, alpha, bias and taps of a part, for one query head and value tile (or `inner` tiles)."""
    del zeros  # The same memory as the outputs of bias and taps.
    form = plan.form
    program, part, tile = _program_of_query_head(plan, refs)
    first, last = _part(plan.blocks - plan.first_query, parts, plan.first_query, part)
    alpha = program.alpha()
    tables_of = _window_tables(program, program.head)

    def block(i: Any, carry: tuple[_State, Array]) -> tuple[_State, Array]:
        state, alpha_gradient = carry
        q, y_gradient = _queries(program, i), cast(Any, program.y_gradient(i, tile) if inner == 1 else None)
        loaded = {offset: (_keys(program, i - offset), program.values(i - offset, tile)) for offset in _unrolled(plan)}
        keys = lambda j, offset: loaded[offset][0] if offset in loaded else _keys(program, j)  # noqa: E731
        tables = lambda j, offset: tables_of(i, j, offset)  # noqa: E731
        log_total: Any = _log_totals(program, i, q, tables, keys) if form.local == "softmax" else None
        weights_of = lambda j, offset, pair: _weights(  # noqa: E731
            form, q, keys(j, offset), pair, tables(j, offset), alpha, log_total
        )

        def gradient_of(j: Any, offset: int | None) -> Array:
            given = (y_gradient, loaded[offset][1]) if inner == 1 and offset in loaded else None
            return _weight_gradient(program, inner, i, j, tile, program.head, given)

        def add_delta(j: Any, offset: int | None, delta: Array) -> Array:
            pair = _pair(program, i, j, offset)
            if not pair.has_near:
                return delta
            gradient = gradient_of(j, offset)
            return delta + jnp.sum(weights_of(j, offset, pair).local * gradient, axis=1)

        delta: Any = None
        if form.local == "softmax":
            delta = _over_keys(plan, i, add_delta, jnp.zeros((plan.rows,), jnp.float32))
            _store_per_query(program, outputs.log_total_BHT, i, log_total)
            _store_per_query(program, outputs.delta_BHT, i, delta)

        def pair(j: Any, offset: int | None, totals: tuple[Array, Array]) -> tuple[Array, Array]:
            from_local, from_grouped = totals
            pair, k = _pair(program, i, j, offset), keys(j, offset)
            if pair.empty:
                return totals
            gradient = gradient_of(j, offset)
            at = (program.b, program.head, part, i - j, slice(None), slice(None))
            if pair.has_near:
                score = _score_gradient(form, weights_of(j, offset, pair), pair, gradient, delta)
                from_local += chunk.times(score.astype(k.local.dtype), k.local)
                if plan.bias:
                    triton.atomic_add(outputs.bias_pairs, at, score)
            if pair.has_far:
                seen = _where(pair.far, gradient)
                from_grouped += chunk.times(seen.astype(k.grouped.dtype), k.grouped)
            if pair.kinds.band:
                triton.atomic_add(outputs.taps_pairs, at, _where(pair.band, gradient))
            return from_local, from_grouped

        first = tuple(jnp.zeros((plan.rows, padded(size)), jnp.float32) for size in (plan.size, plan.grouped_size))
        from_local, from_grouped = _over_keys(plan, i, pair, first)
        if form.grouped:
            far = chunk.times_transposed(y_gradient, state.state.astype(y_gradient.dtype))
            from_grouped += _where(None if plan.aligned else _own(program, refs.layout.value_run, i, state), far)
            alpha_gradient += jnp.sum(from_grouped * q.grouped.astype(jnp.float32))
            state = _fold_window(program, i, state, loaded, tile)
        gradients = chunk.operand_gradients(
            form,
            q.raw,
            q.raw_grouped,
            form.score_scale * from_local if form.scored else None,
            alpha * from_grouped if form.grouped else None,
        )
        start = i * plan.rows - plan.context
        _store_gradients(program, (outputs.q, outputs.grouped_q), start, program.head, gradients, tile)
        return state, alpha_gradient

    run = None if plan.aligned else program.run_at(_lowest(plan, first) * plan.rows - 1)
    state = _first_state(program, _entry(program, parts, part), tile, run)
    _, alpha_gradient = jax.lax.fori_loop(first, last, block, (state, jnp.float32(0)))
    if form.grouped:
        outputs.alpha_BHZI[program.b, program.head, part, tile] = alpha_gradient


def _store_per_query(program: _Program, ref: Any, i: Any, x: Array) -> None:
    start = i * program.plan.rows - program.plan.context
    token = start + jax.lax.iota(jnp.int32, program.plan.rows)
    at = ref.at[program.b, program.head, pl.ds(start, program.plan.rows)]
    triton.store(at, x, mask=(token >= 0) & (token < program.plan.tokens))


def _store_gradients(program: _Program, refs: Any, start: Any, head: Any, gradients: Any, tile: Any) -> None:
    """Gradients of queries or keys, and of the grouped branch's own ones; what has no place is not written."""
    for ref, gradient in zip(refs, gradients, strict=True):
        if ref is not None:
            _store(program, ref, start, head, program.zero, gradient, (tile,) if len(ref.shape) == 5 else ())


class KeyOutputs(NamedTuple):
    """What `key_gradients_kernel` writes; None: not asked for."""

    k: Any
    grouped_k: Any
    v: Any


def key_gradients_kernel(plan: GpuPlan, parts: int, inner: int, local: bool, refs: Refs, outputs: KeyOutputs) -> None:
    """Gradients of keys (of the local branch if `local`) and values of a part, for one key head and value tile."""
    form = plan.form
    program, part, tile = _program_of_key_head(plan, refs)
    first, last = _part(plan.blocks, parts, 0, part)

    def block(n: Any, state: _State) -> _State:
        j = last - 1 - (n - first)
        k, value = _keys(program, j), program.values(j, tile)
        from_local, from_grouped, from_value = (
            jnp.zeros((plan.rows, width), jnp.float32)
            for width in (padded(plan.size), padded(plan.grouped_size), plan.tile)
        )
        mask = None
        if form.grouped:
            own = None if plan.aligned else _own(program, refs.layout.key_run, j, state)
            from_grouped, from_value = chunk.fold_gradients(k.grouped, value, own, state.state)
            if _unrolled(plan):
                state, mask = _before_queries(program, state, j + plan.lag)

        def of_head(head: Any, totals: Any) -> Any:
            alpha, folded = program.alpha(head), totals[3]
            loaded = {
                offset: (_queries(program, j + offset, head), program.y_gradient(j + offset, tile, head))
                for offset in _unrolled(plan)
            }

            def pair(i: Any, offset: int | None, totals: Any) -> Any:
                from_local, from_grouped, from_value = totals
                q, y_gradient = loaded[offset] if offset in loaded else (_queries(program, i, head), None)
                pair, tables = _pair(program, i, j, offset), _tables(program, i, j, offset, head)
                log_total: Any = None
                delta: Any = None
                if form.local == "softmax":
                    log_total = program.per_query(refs.extra.log_total_BHT, i, head, jnp.inf)
                    delta = program.per_query(refs.extra.delta_BHT, i, head, 0.0)
                weights = _weights(form, q, k, pair, tables, alpha, log_total)
                if outputs.v is not None and weights.total is not None:
                    y_gradient = program.y_gradient(i, tile, head) if y_gradient is None else y_gradient
                    from_value += chunk.transposed_times(weights.total.astype(y_gradient.dtype), y_gradient)
                has_local, has_far = local and pair.has_near, pair.has_far
                if has_local or has_far:
                    given = (y_gradient, value) if inner == 1 and y_gradient is not None else None
                    gradient = _weight_gradient(program, inner, i, j, tile, head, given)
                    if has_local:
                        score = _score_gradient(form, weights, pair, gradient, delta)
                        from_local += chunk.transposed_times(score.astype(q.local.dtype), q.local)
                    if has_far:
                        seen = _where(pair.far, alpha * gradient)
                        from_grouped += chunk.transposed_times(seen.astype(q.grouped.dtype), q.grouped)
                return from_local, from_grouped, from_value

            totals = _over_queries(plan, j, pair, totals[:3])
            if form.grouped and loaded:
                q, y_gradient = loaded[cast(int, plan.lag)]
                folded = _fold_head(program, folded, q.grouped, y_gradient, mask, head)
            return (*totals, folded)

        totals = _over_heads(program, of_head, (from_local, from_grouped, from_value, state.state))
        from_local, from_grouped, from_value, folded = totals
        state = _State(folded, state.run)
        if form.grouped and not _unrolled(plan):
            state = _fold_leaving(program, j, state, tile)
        gradients = chunk.operand_gradients(
            form,
            k.raw,
            k.raw_grouped,
            form.score_scale * from_local if form.scored and local else None,
            from_grouped if form.grouped else None,
        )
        _store_gradients(program, (outputs.k, outputs.grouped_k), j * plan.rows, program.key_head, gradients, tile)
        if outputs.v is not None:
            _store(program, outputs.v, j * plan.rows, program.key_head, tile * plan.tile, from_value)
        return state

    run = None if plan.aligned else program.run_at((_highest(plan, last - 1) + 1) * plan.rows)
    jax.lax.fori_loop(first, last, block, _first_state(program, part, tile, run))


def _fold_leaving(program: _Program, j: Any, state: _State, tile: Any) -> _State:
    """The gradient of the state that block j - 1 of keys adds to: with the queries that see that block no longer."""
    plan = program.plan
    if plan.lag is not None:
        return _fold_queries(program, state, j + plan.lag, tile)
    before = jnp.where(j == 0, _highest(plan, 0) + 1, _highest(plan, jnp.maximum(j - 1, 0)) + 1)
    stop = _highest(plan, j) + 1
    return jax.lax.fori_loop(
        before, stop, lambda n, state: _fold_queries(program, state, stop - 1 - (n - before), tile), state
    )
