"""Normalisations against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.layers.norms import NORMS

C = 12
X = np.random.default_rng(0).standard_normal((3, 4, C))


def scale_norm(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(C), 1e-5)


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("size", [1e-7, 1.0, 1e4])
@pytest.mark.parametrize(("name", "formula"), [("scalenorm", scale_norm), ("layernorm", layer_norm)])
def test_equals_the_formula(name, formula, size):
    actual = NORMS[name](C)(jnp.asarray(size * X, jnp.float32))
    np.testing.assert_allclose(actual, formula(size * X), rtol=1e-4, atol=1e-5)


def test_parameters():
    x = jnp.asarray(X, jnp.float32)
    norm = NORMS["scalenorm"](C)
    norm.scale[...] = jnp.asarray(2.5)
    np.testing.assert_allclose(norm(x), 2.5 * scale_norm(X), rtol=1e-4)
    norm = NORMS["layernorm"](C)
    norm.weight[...], norm.bias[...] = jnp.arange(C, dtype=jnp.float32), -jnp.arange(C, dtype=jnp.float32)
    np.testing.assert_allclose(norm(x), np.arange(C) * layer_norm(X) - np.arange(C), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(NORMS))
def test_zero_has_finite_gradients(name):
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(NORMS[name](C)(x)))(jnp.zeros((2, C)))
    assert value == 0
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", sorted(NORMS))
def test_bfloat16_is_normalised_in_float32(name):
    x = jnp.asarray(X, jnp.bfloat16)
    half = NORMS[name](C)(x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, NORMS[name](C)(x.astype(jnp.float32)).astype(jnp.bfloat16))
