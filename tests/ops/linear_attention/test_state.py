"""Which token sits in which slot of the state, against lists of tokens."""

import functools
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.ops.layout import token_layout
from lin_jax.ops.linear_attention.arguments import AttentionOptions
from lin_jax.ops.linear_attention.state import Pending, advance, context_tokens, empty_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

T, CHUNKS = 6, 3
ids = st.lists(st.integers(0, 2), min_size=T, max_size=T) | st.integers(0, T).map(lambda n: [1] * n + [0] * (T - n))
SIZES = [(1, 1, 0), (1, 2, 4), (3, 1, 2), (3, 2, 9), (4, 3, 13), (8, 1, 1)]


def follow(history: list[int], ids: list[int], tokens: list[int]) -> list[int]:
    """The tokens, first to last, of the sequence to which a row's last real token belongs."""
    if not any(ids):
        return history
    end = max(t for t in range(T) if ids[t])
    start = end
    while start and ids[start - 1] == ids[end]:
        start -= 1
    return (history if start == 0 else []) + tokens[start : end + 1]


def token_at(history: list[int], position: int) -> int:
    return history[position] if 0 <= position < len(history) else 0


@functools.cache
def advance_compiled(G: int, R: int):
    def one(state, token_BT, ids_BT):
        # A token is a number; key, grouped key and value are distinct multiples of it.
        x = token_BT[:, :, None, None].astype(jnp.float32)
        layout = token_layout(ids_BT, state.length_B)
        options = AttentionOptions(group_size=G, local_groups=R)
        tokens = Pending(x, jnp.concatenate([3 * x, jnp.ones_like(x)], -1), 2 * x)
        state = advance(state, tokens, layout, options)
        return state, context_tokens(state, options)

    return jax.jit(one)


@pytest.mark.parametrize(("G", "R", "W"), SIZES)
@hypothesis.settings(max_examples=20)
@hypothesis.given(rows=st.lists(st.lists(ids, min_size=2, max_size=2), min_size=CHUNKS, max_size=CHUNKS))
def test_every_slot_holds_the_token_of_its_position(G, R, W, rows):
    x = jnp.zeros((2, 1, 1, 1))
    options = AttentionOptions(group_size=G, local_groups=R)
    state = empty_state(x, x, options, grouped_k_BTKP=jnp.zeros((2, 1, 1, 2)), taps=W)
    histories: list[list[int]] = [[], []]
    for chunk, pair in enumerate(rows):
        tokens = 1 + T * chunk + np.arange(T) + 50 * np.arange(2)[:, None]
        state, context = advance_compiled(G, R)(state, jnp.asarray(tokens), jnp.asarray(pair, jnp.int32))
        histories = [follow(histories[b], pair[b], tokens[b].tolist()) for b in range(2)]
        for b, history in enumerate(histories):
            check_state(row(vars(state), b), history, G, R, W)
            check_context(row(context._asdict(), b), history, G, R, W)


def row(arrays: dict, b: int) -> SimpleNamespace:
    return SimpleNamespace(**{name: np.asarray(x[b]) for name, x in arrays.items() if x is not None})


def check_state(state, history: list[int], G: int, R: int, W: int) -> None:
    length = len(history)
    start = (length // G - R + 1) * G
    window = np.array([token_at(history, start + slot) for slot in range(R * G)])
    assert state.length_B == length
    np.testing.assert_array_equal(state.key_BSKD[:, 0, 0], window)
    np.testing.assert_array_equal(state.value_BSKE[:, 0, 0], 2 * window)
    np.testing.assert_array_equal(state.grouped_key_BSKP[:, 0, 0], 3 * window)
    tail = [2 * token_at(history, length - back) for back in range(W - 1, 0, -1)]
    np.testing.assert_array_equal(state.tail_BUKE[:, 0, 0], tail)
    folded = np.array(history[: max(start, 0)], np.float64)
    np.testing.assert_array_equal(state.state_BKPE[0, :, 0], [np.sum(6 * folded**2), np.sum(2 * folded)])


def check_context(context, history: list[int], G: int, R: int, W: int) -> None:
    length, Y = len(history), max(R * G, W - 1)
    start = (length // G - R + 1) * G
    positions = np.arange(length - Y, length)
    np.testing.assert_array_equal(context.position_BY, positions)
    in_window = (positions >= max(start, 0)) & (positions < length)
    np.testing.assert_array_equal(context.folded_BY, ~in_window)
    keys = [token_at(history, p) if near else 0 for p, near in zip(positions, in_window, strict=True)]
    np.testing.assert_array_equal(context.key_BYKD[:, 0, 0], keys)
    np.testing.assert_array_equal(context.grouped_key_BYKP[:, 0, 0], 3 * np.array(keys))
    in_tail = positions >= length - (W - 1)
    values = [2 * token_at(history, p) if known else 0 for p, known in zip(positions, in_window | in_tail, strict=True)]
    np.testing.assert_array_equal(context.value_BYKE[:, 0, 0], values)


def test_the_size_does_not_depend_on_the_tokens_before():
    x = jnp.ones((1, 40, 2, 4))
    options = AttentionOptions(group_size=4, local_groups=2)
    empty = empty_state(x, x, options, taps=3)
    layout = token_layout(jnp.ones((1, 40), jnp.int32), empty.length_B)
    full = jax.jit(lambda state: advance(state, Pending(x, None, x), layout, options))(empty)
    assert [x.shape for x in jax.tree.leaves(full)] == [x.shape for x in jax.tree.leaves(empty)]
    assert full.grouped_key_BSKP is None
