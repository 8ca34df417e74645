"""Feature maps: the kernels that random ones estimate, and what happens at zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.ops.linear_attention.feature_maps import (
    FEATURE_MAPS,
    elu1,
    favor,
    fourier,
    identity,
    orthogonal_projection,
    relu,
    unit,
)

D, FEATURES, PAIRS = 8, 4096, 16


def vectors() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(0.5 * rng.standard_normal((PAIRS, D)), jnp.float32) for _ in range(2))
    return q, k


def test_favor_estimates_the_softmax_kernel():
    q, k = vectors()
    projection = orthogonal_projection(jax.random.key(0), FEATURES, D)
    estimate = np.sum(np.asarray(favor(q, projection) * favor(k, projection), np.float64), axis=-1)
    x, y = np.asarray(q) / D**0.25, np.asarray(k) / D**0.25
    kernel = np.exp(np.sum(x * y, -1))
    # E[(phi(q)_i phi(k)_i P)^2] for independent features; orthogonal ones vary less.
    second_moment = np.exp(2 * np.sum((x + y) ** 2, -1) - np.sum(x**2, -1) - np.sum(y**2, -1))
    deviation = np.sqrt((second_moment - kernel**2) / FEATURES)
    assert np.all(np.abs(estimate - kernel) < 4 * deviation)
    assert np.all(deviation < 0.2 * kernel)


def test_fourier_estimates_the_gaussian_kernel():
    q, k = vectors()
    projection = orthogonal_projection(jax.random.key(1), FEATURES // 2, D)
    q_features, k_features = fourier(q, projection), fourier(k, projection)
    assert q_features.shape == (PAIRS, FEATURES)
    estimate = np.sum(np.asarray(q_features * k_features, np.float64), axis=-1)
    square = np.sum((q - k) ** 2, -1)
    # The variance of cos(w . (q - k)) for a standard normal w.
    deviation = np.sqrt((1 - np.exp(-square)) ** 2 / 2 / (FEATURES // 2))
    assert np.all(np.abs(estimate - np.exp(-square / 2)) < 4 * deviation)
    np.testing.assert_allclose(np.sum(q_features**2, -1), 1, rtol=1e-5)


@pytest.mark.parametrize("features", [3, 8, 20])
def test_rows_of_a_block_are_orthogonal(features):
    projection = np.asarray(orthogonal_projection(jax.random.key(2), features, D))
    assert projection.shape == (features, D)
    for start in range(0, features, D):
        block = projection[start : start + D]
        gram = block @ block.T
        np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-4)


def test_rows_have_the_lengths_of_normal_vectors():
    square = np.sum(np.asarray(orthogonal_projection(jax.random.key(3), FEATURES, D)) ** 2, -1)
    # Chi-squared with D degrees of freedom: mean D, variance 2 D.
    assert abs(square.mean() - D) < 4 * np.sqrt(2 * D / FEATURES)
    assert abs(square.var() / (2 * D) - 1) < 0.2


def test_maps_without_parameters():
    x = vectors()[0]
    np.testing.assert_array_equal(identity(x), x)
    np.testing.assert_allclose(unit(x), x / np.linalg.norm(x, axis=-1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(relu(x), np.maximum(x, 0))
    np.testing.assert_allclose(elu1(x), np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))), rtol=1e-5)


def maps():
    return [pytest.param(feature_map, id=name) for name, feature_map in FEATURE_MAPS.items()]


def arrays_of(feature_map, features=6):
    return [array.draw(jax.random.key(7), D, features) for array in feature_map.arrays]


@pytest.mark.parametrize("feature_map", maps())
def test_records_say_what_maps_do(feature_map):
    """Sizes, shapes of arrays, signs, and the gradient that kernels are given."""
    x, features = vectors()[0], 6
    arrays = arrays_of(feature_map, features)
    for array, drawn in zip(feature_map.arrays, arrays, strict=True):
        assert drawn.shape == array.shape(D, features)
    phi, pullback = jax.vjp(lambda x: feature_map.apply(x, *arrays), x)
    assert phi.shape == (PAIRS, feature_map.size(D, features))
    assert bool(jnp.any(phi < 0)) != feature_map.non_negative
    if feature_map.gradient is not None:
        cotangent = jnp.cos(jnp.arange(phi.size, dtype=jnp.float32)).reshape(phi.shape)
        np.testing.assert_allclose(feature_map.gradient(x, cotangent), pullback(cotangent)[0], atol=1e-6)
    else:
        assert feature_map.arrays


@pytest.mark.parametrize("name", [name for name, feature_map in FEATURE_MAPS.items() if not feature_map.arrays])
def test_zero_vectors_have_finite_features_and_gradients(name):
    features, pullback = jax.vjp(FEATURE_MAPS[name].apply, jnp.zeros((2, D)))
    assert np.all(np.isfinite(features))
    assert np.all(np.isfinite(pullback(jnp.ones_like(features))[0]))
    assert np.all(np.asarray(features) == (1 if name == "elu1" else 0))


@pytest.mark.parametrize("random_map", [favor, fourier])
def test_random_features_keep_the_type_and_are_close_in_bfloat16(random_map):
    x, projection = vectors()[0], orthogonal_projection(jax.random.key(5), 64, D)
    half = random_map(x.astype(jnp.bfloat16), projection)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), random_map(x, projection), atol=0.02)
