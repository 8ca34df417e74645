"""The causal convolution against the library's own, loops, and the same inside augmented attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.ops.causal_conv import causal_conv as causal_conv_eager
from lin_jax.ops.linear_attention import augmented_attention

causal_conv = jax.jit(causal_conv_eager)

pytestmark = pytest.mark.usefixtures("quick_compilation")

IDS = np.array([[1] * 9 + [2] * 4 + [0] * 3 + [2] * 7, [0] * 5 + [3] * 18])


def make(B=2, T=23, H=3, E=4, W=5, shared=False, seed=0):
    rng = np.random.default_rng(seed)
    x, taps = rng.standard_normal((B, T, H, E)), rng.standard_normal((W, 1 if shared else H))
    return jnp.asarray(x, jnp.float32), jnp.asarray(taps, jnp.float32)


@jax.jit
def by_library(x, taps):
    """One depthwise convolution with H E channels, padded on the left."""
    B, T, H, E = x.shape
    kernel = jnp.repeat(jnp.broadcast_to(taps, (taps.shape[0], H)), E, axis=1)[::-1, None]
    y = jax.lax.conv_general_dilated(
        x.reshape(B, T, H * E),
        kernel,
        window_strides=(1,),
        padding=[(taps.shape[0] - 1, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=H * E,
    )
    return y.reshape(x.shape)


def by_loop(x, taps, ids, ahead=0):
    y, x, taps = np.zeros(x.shape), np.asarray(x, np.float64), np.asarray(taps, np.float64)
    for b, t in np.ndindex(ids.shape):
        for tap in range(len(taps)):
            s = t - tap + ahead
            between = ids[b, min(s, t) : max(s, t) + 1]
            if 0 <= s < ids.shape[1] and ids[b, t] and (between == ids[b, t]).all():
                y[b, t] += taps[tap][:, None] * x[b, s]
    return y


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("T", "W"), [(23, 5), (23, 1), (4, 9), (1, 3)])
def test_equals_the_library(T, W, shared):
    x, taps = make(T=T, W=W, shared=shared)
    np.testing.assert_allclose(causal_conv(x, taps), by_library(x, taps), atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_equal_the_library(shared):
    x, taps = make(shared=shared)
    cotangent = make(seed=1)[0]
    gradient = lambda f: jax.grad(lambda *a: jnp.sum(f(*a) * cotangent), argnums=(0, 1))(x, taps)  # noqa: E731
    for actual, expected in zip(gradient(causal_conv), gradient(by_library), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize(("W", "ahead"), [(1, 0), (5, 0), (40, 0), (5, 2), (4, 3), (61, 30)])
def test_segments_and_padding(W, ahead):
    x, taps = make(W=W)
    y = causal_conv_eager(x, taps, jnp.asarray(IDS), ahead=ahead)
    np.testing.assert_allclose(y, by_loop(x, taps, IDS, ahead), atol=1e-5)
    assert np.all(np.asarray(y)[IDS == 0] == 0)


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("W", [5, 40])
def test_is_the_convolution_of_augmented_attention(ids, W):
    x, taps = make(W=W)
    ids = None if ids is None else jnp.asarray(ids)
    options = {"local": "none", "grouped": False, "group_size": 4, "segment_ids_BT": ids}
    y = augmented_attention(x, x, x, conv_WH=taps, **options)
    np.testing.assert_allclose(causal_conv(x, taps, ids), y, atol=1e-5)


def test_no_token_sees_a_later_one():
    x, taps = make(B=1, H=1, E=1)
    jacobian = jax.jacobian(lambda x: causal_conv(x, taps).ravel())(x).reshape(23, 23)
    distance = np.arange(23)[:, None] - np.arange(23)
    seen = (distance >= 0) & (distance < 5)
    expected = np.where(seen, np.asarray(taps)[np.clip(distance, 0, 4), 0], 0)
    np.testing.assert_array_equal(jacobian, expected)


def test_bfloat16_is_summed_in_float32():
    x, taps = make(W=12)
    half = causal_conv(x.astype(jnp.bfloat16), taps)
    assert half.dtype == jnp.bfloat16
    wide = causal_conv(x.astype(jnp.bfloat16).astype(jnp.float32), taps)
    np.testing.assert_array_equal(half, wide.astype(jnp.bfloat16))
