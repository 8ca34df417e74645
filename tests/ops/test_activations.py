"""Activations of the local branch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.ops.activations import ACTIVATIONS, laplace, masked_softmax, relu2

SCORES = np.concatenate([np.linspace(-4, 4, 41), [0.0, 0.5**0.5]])


def test_laplace_is_the_distribution_function_of_a_normal_variable():
    mean, deviation = math.sqrt(1 / 2), math.sqrt(1 / (4 * math.pi))
    expected = [0.5 * (1 + math.erf((s - mean) / (deviation * math.sqrt(2)))) for s in SCORES]
    np.testing.assert_allclose(laplace(jnp.asarray(SCORES, jnp.float32)), expected, atol=1e-6)


def test_relu2():
    expected = [max(s, 0) ** 2 for s in SCORES]
    np.testing.assert_allclose(relu2(jnp.asarray(SCORES, jnp.float32)), expected, rtol=1e-6)


def softmax_of_seen(score: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Row by row, over the entries that are seen alone."""
    result = np.zeros_like(score)
    for row in np.ndindex(score.shape[:-1]):
        seen = np.flatnonzero(mask[row])
        if len(seen):
            weight = [math.exp(score[row][s] - score[row][seen].max()) for s in seen]
            result[row][seen] = np.array(weight) / sum(weight)
    return result


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_masked_softmax(size):
    rng = np.random.default_rng(0)
    score, mask = size * rng.standard_normal((3, 5, 7)), rng.random((3, 5, 7)) < 0.5
    mask[0, 0], mask[1, 2] = False, True
    actual = masked_softmax(jnp.asarray(score, jnp.float32), jnp.asarray(mask))
    np.testing.assert_allclose(actual, softmax_of_seen(score, mask), atol=2e-5)
    assert np.all(np.asarray(actual)[~mask] == 0)


def test_gradients_of_masked_softmax_are_those_of_softmax_over_the_seen():
    rng = np.random.default_rng(1)
    score, cotangent = (jnp.asarray(rng.standard_normal(6), jnp.float32) for _ in range(2))
    seen = jnp.asarray([0, 2, 5])
    mask = jnp.zeros(6, bool).at[seen].set(True)
    actual = jax.grad(lambda s: jnp.sum(masked_softmax(s, mask) * cotangent))(score)
    expected = jax.grad(lambda s: jnp.sum(jax.nn.softmax(s) * cotangent[seen]))(score[seen])
    np.testing.assert_allclose(actual[seen], expected, atol=1e-6)
    assert np.all(np.asarray(actual)[~np.asarray(mask)] == 0)


@pytest.mark.parametrize("local", sorted(ACTIVATIONS))
@pytest.mark.parametrize("fill", [0.0, 1e30, -1e30])
def test_a_row_that_sees_nothing_gives_nothing_and_no_nan(local, fill):
    score, mask = jnp.full((2, 4), fill).at[1].set(0.5), jnp.asarray([[False] * 4, [True] * 4])

    def total(score):
        return jnp.sum(jnp.arange(4.0)[None] * ACTIVATIONS[local].weights(score, mask))

    weights, gradient = ACTIVATIONS[local].weights(score, mask), jax.grad(total)(score)
    assert np.all(np.asarray(weights[0]) == 0)
    assert np.all(np.asarray(gradient[0]) == 0)
    assert np.all(np.isfinite(weights)) and np.all(np.isfinite(gradient))
    assert np.all(np.asarray(weights[1]) > 0)
