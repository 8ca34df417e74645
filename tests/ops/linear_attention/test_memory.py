"""Linear attention to a memory of another length, against the definition; padding of the memory is never seen."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.ops.linear_attention import reference
from lin_jax.ops.linear_attention.feature_maps import FEATURE_MAPS, MapArrays
from lin_jax.ops.linear_attention.memory import attend_memory, memory_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

D, E, FEATURES = 4, 3, 6


def make(seed, T, A, K, J, B=2):
    rng = np.random.default_rng(seed)
    shapes = (B, T, K * J, D), (B, A, K, D), (B, A, K, E)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return q, k, v, jnp.asarray(rng.random((B, A)) < 0.6)


def arrays_of(name):
    arrays = tuple(array.draw(jax.random.key(0), D, FEATURES) for array in FEATURE_MAPS[name].arrays)
    return MapArrays(arrays, arrays)


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
@hypothesis.settings(max_examples=3)
@hypothesis.given(
    seed=st.integers(0, 99), T=st.integers(1, 6), A=st.integers(1, 9), K=st.integers(1, 2), J=st.integers(1, 2)
)
def test_equals_the_definition_in_values_and_gradients(name, seed, T, A, K, J):
    q, k, v, real = make(seed, T, A, K, J)
    arrays = arrays_of(name)

    def by_state(q, k, v):
        return attend_memory(q, memory_state(k, v, real, name, *arrays.key), name, *arrays.query)

    def by_definition(q, k, v):
        return reference.attend_memory(q, k, v, real, name, arrays)

    def both(attend):
        y, pull = jax.vjp(attend, q, k, v)
        return y, pull(jnp.cos(y))

    for a, b in zip(*(jax.tree.leaves(both(f)) for f in (by_state, by_definition)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_definition_is_a_sum_over_real_tokens():
    """Loops of numpy that share nothing with the library."""
    q, k, v, real = (np.asarray(x) for x in make(1, 3, 5, 2, 2))
    expected = np.zeros((2, 3, 4, E))
    for b, t, h, s in np.ndindex(2, 3, 4, 5):
        if real[b, s]:
            weight = np.maximum(q[b, t, h], 0) @ np.maximum(k[b, s, h // 2], 0)
            expected[b, t, h] += weight * v[b, s, h // 2]
    actual = reference.attend_memory(*map(jnp.asarray, (q, k, v, real)), "relu")
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
def test_padding_never_leaks(name):
    """Nor do infinities and NaN in it, neither into outputs nor into gradients."""
    q, k, v, real = make(2, 4, 7, 1, 2)
    arrays = arrays_of(name)

    def total(k, v, attend):
        y = attend(k, v)
        return jnp.sum(jnp.sin(y)), y

    def by_state(k, v):
        return attend_memory(q, memory_state(k, v, real, name, *arrays.key), name, *arrays.query)

    def by_definition(k, v):
        return reference.attend_memory(q, k, v, real, name, arrays)

    padding = ~real[:, :, None, None]
    for attend in (by_state, by_definition):
        gradients, y = jax.grad(total, argnums=(0, 1), has_aux=True)(k, v, attend)
        for gradient in gradients:
            assert np.all(np.asarray(gradient)[~np.asarray(real)] == 0)
        for bad in (1e4, jnp.inf, jnp.nan):
            np.testing.assert_array_equal(y, attend(k, jnp.where(padding, bad, v)))
        np.testing.assert_array_equal(y, attend(jnp.where(padding, 3.0, k), v))
