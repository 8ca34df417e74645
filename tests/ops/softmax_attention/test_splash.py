"""Splash attention, simulated, against XLA's form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.ops.softmax_attention.api import softmax_attention
from lin_jax.ops.softmax_attention.splash import refusal, splash_attention

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_values_and_gradients_with_grouped_queries_and_sequences():
    T, D = 384, 128  # Three tiles of 128 in each direction, of which three are masked whole.
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (jax.random.normal(key, (1, T, heads, D)) for key, heads in zip(keys, (2, 1, 1, 2), strict=True))
    ids_BT = jnp.asarray(np.repeat([1, 2, 1], [100, 200, 84])[None])
    run_BT = jnp.asarray(np.repeat([0, 1, 2], [100, 200, 84])[None])

    def both(attend):
        y, pull = jax.vjp(attend, q, k, v)
        return y, *pull(weights)

    expected = jax.jit(lambda: both(lambda *x: softmax_attention(*x, ids_BT)))()
    found = jax.jit(lambda: both(lambda *x: splash_attention(*x, run_BT, interpret=True)))()
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_what_it_cannot_do_is_told():
    array = jax.ShapeDtypeStruct
    whole, odd, narrow = (array(shape, jnp.float32) for shape in ((1, 256, 2, 128), (1, 200, 2, 128), (1, 256, 2, 64)))
    assert refusal(whole, whole) is None
    assert refusal(odd, odd) == "T=200 is no multiple of 128"
    assert refusal(narrow, narrow) == "head sizes (64, 64) are no multiples of 128"
