"""Runs and positions against a plain loop."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.ops.layout import token_layout

T = 12
rows = st.lists(st.integers(0, 3), min_size=T, max_size=T)
layout_of = jax.jit(token_layout)


def by_loop(ids: list[int], length: int) -> list[tuple[bool, int, int]]:
    """(real, run, position) of each token."""
    result, run, position = [], 0, length
    for t, segment in enumerate(ids):
        if t and segment != ids[t - 1]:
            run, position = run + 1, 0
        result.append((segment != 0, run, position))
        position += 1
    return result


@hypothesis.settings(max_examples=100)
@hypothesis.given(batch=st.tuples(rows, rows), lengths=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_equals_a_loop_over_the_tokens(batch, lengths):
    layout = layout_of(jnp.asarray(batch, jnp.int32), jnp.asarray(lengths, jnp.int32))
    for b in range(2):
        actual = list(zip(*(np.asarray(x[b]).tolist() for x in layout), strict=True))
        assert actual == by_loop(batch[b], lengths[b])


def test_positions_go_on_only_in_the_first_run():
    layout = token_layout(jnp.asarray([[1, 1, 2, 0, 1]]), jnp.asarray([5]))
    np.testing.assert_array_equal(layout.position_BT, [[5, 6, 0, 0, 0]])
    np.testing.assert_array_equal(layout.run_BT, [[0, 0, 1, 2, 3]])
