"""Augmented linear attention as a few matrix products a group: the form for XLA on any device.

Everything is linear in V, so the convolution costs no pass of its own: its taps are a banded Toeplitz matrix that is
added to the local weights before the one product with the values. States of earlier groups come from
`jax.lax.associative_scan` inside a chunk of groups and are carried from chunk to chunk by `jax.lax.scan`; a chunk's
weights are recomputed in the backward pass. Memory is linear in T, with nothing of size T * G or N * D * E.

Rows are divided into blocks of G tokens. Where all rows start a sequence with their first token (`Inputs.aligned`),
blocks are groups. Otherwise the groups of rows and segments begin anywhere in a block: each block then looks one block
further back, and the grouped branch to tokens in those blocks is a masked product like the local one. Both are exact.
"""

# Letters beyond the legend: U = values of the convolution's tail; Y = tokens that a state remembers, as if they stood
# before the row.

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lin_jax.ops.activations import ACTIVATIONS
from lin_jax.ops.layout import token_layout
from lin_jax.ops.linear_attention.inputs import Inputs
from lin_jax.ops.linear_attention.state import context_tokens
from lin_jax.ops.product import product
from lin_jax.ops.target import target
from lin_jax.ops.toeplitz import toeplitz

# Tokens in a chunk. On two CPU cores (H8 D64 G64 W32, T 16384) 256 to 512 were fastest; all groups at once took 1.8
# times as long, as their weights outgrow the cache. Accelerators need more independent products to be busy; their
# figure keeps a chunk's weights at some ten megabytes and is not measured.
CHUNK_TOKENS_CPU = 512
CHUNK_TOKENS_ACCELERATOR = 4096


class _SeenTokens(NamedTuple):
    """Tokens [B, A, ...] that queries may see, in the order of the row."""

    key: Array
    grouped_key: Array | None
    value: Array
    run: Int[Array, "B A"]
    position: Int[Array, "B A"]
    key_known: Bool[Array, "B A"]
    value_known: Bool[Array, "B A"]


class _Queries(NamedTuple):
    """Queries [B, A, ...] of a stretch of blocks."""

    query: Array
    grouped_query: Array | None
    run: Int[Array, "B A"]
    position: Int[Array, "B A"]


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """How a stretch of the row is divided: `count` blocks, each seeing `back` earlier and `ahead` later ones.

    `tail` values before those serve the convolution alone.
    """

    count: int
    back: int
    ahead: int
    tail: int


class _Bands(NamedTuple):
    """Entries of the weight matrices that depend on the distance alone, made once for all blocks.

    [1, 1, K, J, G, S] for the window's slots, [1, 1, K, J, G, tail] for the values before it.
    """

    bias: Array | None
    taps: Array | None
    tail_taps: Array | None


class _States(NamedTuple):
    """States [B, n, K, P, E] of all tokens before (or after) each block's window, and the run they belong to."""

    state: Array
    run: Int[Array, "B n"]


def attend(inputs: Inputs) -> Float[Array, "B T H E"]:
    """Return the outputs, chunk after chunk; of the earlier ones a chunk needs a state and a few tokens."""
    if not inputs.options.causal:
        return _bidirectional(inputs)
    T, G = inputs.arrays.q_BTHD.shape[1], inputs.options.group_size
    chunk_tokens = CHUNK_TOKENS_CPU if target().platform == "cpu" else CHUNK_TOKENS_ACCELERATOR
    blocks = _blocks_of(inputs, count=min(-(-T // G), max(1, chunk_tokens // G)))
    chunks = -(-T // (blocks.count * G))
    queries, tokens = _pad(inputs, chunks * blocks.count * G)
    bands = _bands(inputs, blocks)

    @jax.checkpoint
    def chunk(carry, chunk_inputs):
        before, state, state_run = carry
        queries, tokens = chunk_inputs
        known = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), before, tokens)
        states = _states_before(inputs, blocks, known, state, state_run)
        y = _outputs(inputs, blocks, bands, queries, known, [_States(states.state[:, :-1], states.run[:, :-1])])
        after = jax.tree.map(lambda x, y: _last(x, y.shape[1]), known, before)
        return (after, states.state[:, -1], states.run[:, -1]), y

    state = inputs.initial_state.state_BKPE
    first = (_context(inputs, blocks), state, jnp.zeros(state.shape[:1], jnp.int32))
    split = lambda x: x.reshape(x.shape[0], chunks, -1, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731
    if chunks == 1:
        _, y_BTHE = chunk(first, (queries, tokens))
    else:
        _, y = jax.lax.scan(chunk, first, jax.tree.map(split, (queries, tokens)))
        y_BTHE = y.swapaxes(0, 1).reshape(y.shape[1], -1, *y.shape[3:])
    return y_BTHE[:, :T]


def _bidirectional(inputs: Inputs) -> Float[Array, "B T H E"]:
    """All blocks at once, each with its neighbours on both sides."""
    T, G = inputs.arrays.q_BTHD.shape[1], inputs.options.group_size
    blocks = _blocks_of(inputs, count=-(-T // G))
    queries, tokens = _pad(inputs, blocks.count * G)
    left = _context(inputs, blocks)
    right = jax.tree.map(lambda x: jnp.zeros((x.shape[0], blocks.ahead * G, *x.shape[2:]), x.dtype), tokens)
    known = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), left, tokens, right)
    zero = inputs.initial_state.state_BKPE
    run = jnp.zeros(zero.shape[:1], jnp.int32)
    if inputs.aligned:
        total = _outer_sums(inputs, jax.tree.map(lambda x: x[:, None], tokens), tokens.key_known[:, None])
        states = [_States(jnp.broadcast_to(total, (total.shape[0], blocks.count, *total.shape[2:])), run[:, None])]
    else:
        before = _states_before(inputs, blocks, known, zero, run)
        mirrored = jax.tree.map(lambda x: x[:, ::-1], known)
        mirrored = jax.tree.map(lambda x: x[:, : (blocks.back + blocks.count + blocks.ahead) * G], mirrored)
        mirror_blocks = _Blocks(blocks.count, blocks.ahead, blocks.back, 0)
        after = _states_before(inputs, mirror_blocks, mirrored, zero, run - 2)
        states = [
            _States(before.state[:, :-1], before.run[:, :-1]),
            _States(after.state[:, -2::-1], after.run[:, -2::-1]),
        ]
    bands = _bands(inputs, blocks)
    return jax.checkpoint(_outputs, static_argnums=(0, 1))(inputs, blocks, bands, queries, known, states)[:, :T]


def _blocks_of(inputs: Inputs, count: int) -> _Blocks:
    """Stretches of `count` blocks, with no more blocks around them than there are tokens for."""
    G, taps = inputs.options.group_size, 0 if inputs.arrays.conv_WH is None else inputs.arrays.conv_WH.shape[0]
    back = inputs.options.local_groups - inputs.aligned
    if inputs.fresh:
        back = min(back, -(-inputs.arrays.q_BTHD.shape[1] // G) - 1)
    else:
        # The context of an initial state has this many tokens.
        taps = max(taps, inputs.initial_state.tail_BUKE.shape[1] + 1)
    return _Blocks(count, back, ahead=0 if inputs.options.causal else back, tail=max(0, taps - 1 - back * G))


def _pad(inputs: Inputs, length: int) -> tuple[_Queries, _SeenTokens]:
    """Queries and tokens of the row, padded at its end to `length` with a run of their own, which nothing sees."""
    layout = token_layout(inputs.segment_ids_BT, inputs.initial_state.length_B)
    extra = length - inputs.arrays.q_BTHD.shape[1]

    def pad(x, value=0):
        return jnp.pad(x, ((0, 0), (0, extra), *((0, 0),) * (x.ndim - 2)), constant_values=value)

    arrays = inputs.arrays
    run, position, real = pad(layout.run_BT, -1), pad(layout.position_BT), pad(layout.real_BT)
    grouped_q, grouped_k = (None if x is None else pad(x) for x in (arrays.grouped_q_BTHP, arrays.grouped_k_BTKP))
    queries = _Queries(pad(arrays.q_BTHD), grouped_q, jnp.where(real, run, -1), position)
    return queries, _SeenTokens(pad(arrays.k_BTKD), grouped_k, pad(arrays.v_BTKE), run, position, real, real)


def _context(inputs: Inputs, blocks: _Blocks) -> _SeenTokens:
    """What goes before the row: the tokens that the initial state remembers, or nothing, in the same form."""
    length = blocks.back * inputs.options.group_size + blocks.tail
    B = inputs.arrays.q_BTHD.shape[0]
    if inputs.fresh:
        empty = lambda x: jnp.zeros((B, length, *x.shape[2:]), x.dtype)  # noqa: E731
        grouped_key = None if inputs.arrays.grouped_k_BTKP is None else empty(inputs.arrays.grouped_k_BTKP)
        ints, never = jnp.zeros((B, length), jnp.int32), jnp.zeros((B, length), bool)
        return _SeenTokens(
            empty(inputs.arrays.k_BTKD), grouped_key, empty(inputs.arrays.v_BTKE), ints, ints, never, never
        )
    context = context_tokens(inputs.initial_state, inputs.options)
    context = jax.tree.map(lambda x: _last(x, length), context)
    return _SeenTokens(
        context.key_BYKD,
        context.grouped_key_BYKP,
        context.value_BYKE,
        jnp.zeros_like(context.position_BY),
        context.position_BY,
        ~context.folded_BY,
        context.position_BY >= 0,
    )


def _last(x: Array, length: int) -> Array:
    return x[:, x.shape[1] - length :]


def _windows(x: Array, blocks: _Blocks, G: int) -> Array:
    """[B, (back + count + ahead) * G, ...] to [B, count, (back + 1 + ahead) * G, ...], one window a block."""
    width = blocks.back + 1 + blocks.ahead
    in_blocks = x.reshape(x.shape[0], -1, G, *x.shape[2:])
    return jnp.concatenate([in_blocks[:, i : i + blocks.count] for i in range(width)], axis=2)


def _tails(x: Array, blocks: _Blocks, G: int) -> Array:
    """[B, tail + (back + count + ahead) * G, ...] to [B, count, tail, ...]: what stands right before each window."""
    width = -(-blocks.tail // G)
    stretch = x[:, : (blocks.count + width - 1) * G]
    return _windows(stretch, _Blocks(blocks.count, width - 1, 0, 0), G)[:, :, : blocks.tail]


def _bands(inputs: Inputs, blocks: _Blocks) -> _Bands:
    G, R, K = inputs.options.group_size, inputs.options.local_groups, inputs.arrays.k_BTKD.shape[2]
    slots, back = (blocks.back + 1 + blocks.ahead) * G, blocks.back * G
    by_head = lambda x: x.reshape(1, 1, K, -1, *x.shape[1:])  # noqa: E731
    bias = taps = tail_taps = None
    if inputs.arrays.bias_XH is not None and inputs.options.scored:
        bias = by_head(toeplitz(inputs.arrays.bias_XH, 0 if inputs.options.causal else R * G - 1, G, slots, back))
    if inputs.arrays.conv_WH is not None:
        taps = by_head(toeplitz(inputs.arrays.conv_WH, 0, G, slots, back))
        if blocks.tail:
            tail_taps = by_head(toeplitz(inputs.arrays.conv_WH, 0, G, blocks.tail, back + blocks.tail))
    return _Bands(bias, taps, tail_taps)


def _group_queries(x: Array, blocks: _Blocks, K: int) -> Array:
    """[B, n * G, H, D] to [B, n, K, J, G, D]."""
    B, _, H, D = x.shape
    return x.reshape(B, blocks.count, -1, K, H // K, D).transpose(0, 1, 3, 4, 2, 5)


def _group_keys(x: Array) -> Array:
    """[B, n, S, K, D] to [B, n, K, S, D]."""
    return x.swapaxes(2, 3)


class _Masks(NamedTuple):
    """Which slots of its window each query sees, [B or 1, n or 1, 1, 1, G, S]."""

    local: Array
    grouped: Array | None
    same: Array | None


def _masks(inputs: Inputs, blocks: _Blocks, queries: _Queries, window: _SeenTokens) -> _Masks:
    G, R, causal, S = inputs.options.group_size, inputs.options.local_groups, inputs.options.causal, window.run.shape[2]
    known = window.key_known[:, :, None, None, None, :]
    distance = jnp.arange(G)[:, None] + blocks.back * G - jnp.arange(S)[None]
    distance = distance[None, None, None, None]
    if inputs.aligned:
        past = distance >= 0 if causal else jnp.ones_like(distance, bool)
        return _Masks(past if S == G and causal else past & known, None, None)
    run, position = (x.reshape(x.shape[0], blocks.count, G) for x in (queries.run, queries.position))
    same = (run[..., None] == window.run[:, :, None, :])[:, :, None, None]
    groups = (position[..., None] // G - window.position[:, :, None, :] // G)[:, :, None, None]
    near = (distance >= 0) & (groups < R) if causal else abs(groups) < R
    far = groups >= R if causal else jnp.array(True)
    return _Masks(same & known & near, same & known & far, same)


def _outputs(
    inputs: Inputs, blocks: _Blocks, bands: _Bands, queries: _Queries, known: _SeenTokens, states: list[_States]
) -> Float[Array, "B A H E"]:
    """Outputs of `blocks.count` blocks, given the tokens around them and the states beyond those."""
    G, (B, A, H, _), K = inputs.options.group_size, queries.query.shape, known.key.shape[2]
    dtype = known.value.dtype
    window = jax.tree.map(lambda x: _windows(x[:, blocks.tail :], blocks, G), known)
    masks = _masks(inputs, blocks, queries, window)
    phi = inputs.options.inner_map.apply
    alpha = inputs.alpha_H.reshape(1, 1, K, H // K, 1, 1)

    weights = jnp.zeros(())
    query = _group_queries(queries.query, blocks, K)
    if inputs.options.scored:
        score = inputs.options.score_scale * product("bnkjgd,bnksd->bnkjgs", query, _group_keys(window.key))
        score = score if bands.bias is None else score + bands.bias
        weights += ACTIVATIONS[inputs.options.local].weights(score, masks.local)
    if inputs.options.grouped:
        phi_query = phi(query if queries.grouped_query is None else _group_queries(queries.grouped_query, blocks, K))
        if masks.grouped is not None:
            phi_key = _group_keys(phi(window.key if window.grouped_key is None else window.grouped_key))
            score = product("bnkjgp,bnksp->bnkjgs", phi_query, phi_key)
            weights += jnp.where(masks.grouped, alpha * score, 0)
    if bands.taps is not None:
        weights += bands.taps if masks.same is None else jnp.where(masks.same, bands.taps, 0)

    y = jnp.zeros((B, blocks.count, K, H // K, G, known.value.shape[-1]), jnp.float32)
    if weights.ndim:
        weights = jnp.broadcast_to(weights, (B, blocks.count, K, H // K, *weights.shape[-2:]))
        y += product("bnkjgs,bnkse->bnkjge", weights.astype(dtype), _group_keys(window.value))
    if bands.tail_taps is not None:
        y += _tail_convolution(inputs, blocks, bands.tail_taps, queries, known)
    if inputs.options.grouped:
        for beyond in states:
            far = product("bnkjgp,bnkpe->bnkjge", phi_query, beyond.state.astype(phi_query.dtype))
            if masks.grouped is not None:
                own = queries.run.reshape(B, blocks.count, 1, 1, G, 1) == beyond.run[:, :, None, None, None, None]
                far = jnp.where(own, far, 0)
            y += alpha * far
    y = y.astype(dtype).transpose(0, 1, 4, 2, 3, 5).reshape(B, A, H, -1)
    return y if masks.same is None else jnp.where((queries.run >= 0)[..., None, None], y, 0)


def _tail_convolution(
    inputs: Inputs, blocks: _Blocks, taps: Array, queries: _Queries, known: _SeenTokens
) -> Float[Array, "B n K J G E"]:
    """The taps that reach before the window."""
    G, taps = inputs.options.group_size, taps.astype(known.value.dtype)
    values = _group_keys(_tails(known.value, blocks, G))
    if inputs.aligned:
        return product("kjgu,bnkue->bnkjge", taps[0, 0], values)
    run, valid = _tails(known.run, blocks, G), _tails(known.value_known, blocks, G)
    query_run = queries.run.reshape(*run.shape[:2], G, 1)
    seen = ((query_run == run[:, :, None]) & valid[:, :, None])[:, :, None, None]
    return product("bnkjgu,bnkue->bnkjge", jnp.where(seen, taps, 0), values)


def _outer_sums(inputs: Inputs, divided: _SeenTokens, mask: Bool[Array, "B n S"]) -> Float[Array, "B n K P E"]:
    """Sum of phi(k) v^T over the masked tokens of each block of `divided`, whose fields are [B, n, S, ...]."""
    phi_key = inputs.options.inner_map.apply(divided.key if divided.grouped_key is None else divided.grouped_key)
    if not inputs.aligned or not inputs.options.causal:
        phi_key = jnp.where(mask[..., None, None], phi_key, 0)
    return product("bnksp,bnkse->bnkpe", _group_keys(phi_key), _group_keys(divided.value))


def _states_before(inputs: Inputs, blocks: _Blocks, known: _SeenTokens, state: Array, state_run: Array) -> _States:
    """States before the windows of all blocks, and the one after the last: [B, count + 1, K, P, E].

    Elements of the scan are (r, S): r says that S starts a new sequence, and
    (r1, S1) + (r2, S2) = (r1 or r2, S2 if r2 else S1 + S2).
    """
    G = inputs.options.group_size
    fold = lambda x: x[:, blocks.tail :][:, : blocks.count * G]  # noqa: E731
    divided = jax.tree.map(lambda x: fold(x).reshape(x.shape[0], blocks.count, G, *x.shape[2:]), known)
    if not inputs.options.grouped:
        return _States(state[:, None], jnp.broadcast_to(state_run[:, None], (state.shape[0], blocks.count + 1)))
    last_run = divided.run[:, :, -1]
    run = jnp.concatenate([state_run[:, None], last_run], axis=1)
    sums = _outer_sums(inputs, divided, divided.key_known & (divided.run == last_run[..., None]))
    sums = jnp.concatenate([state[:, None], sums], axis=1)
    if inputs.aligned:
        return _States(jax.lax.associative_scan(jnp.add, sums, axis=1), run)
    starts = jnp.concatenate([jnp.zeros_like(run[:, :1], bool), run[:, 1:] != run[:, :-1]], axis=1)

    def combine(a, b):
        reset = b[0][..., None, None, None]
        return a[0] | b[0], jnp.where(reset, b[1], a[1] + b[1])

    return _States(jax.lax.associative_scan(combine, (starts, sums), axis=1)[1], run)
