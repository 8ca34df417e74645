"""Softmax attention and LongLoRA's, with biases, windows, both directions and memories, by their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lin_jax.ops.shards import Shards
from lin_jax.ops.softmax_attention.api import longlora_attention, softmax_attention
from tests.ops.heads import random_heads

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, A, H, K, D = 2, 6, 9, 4, 2, 5
IDS = np.array([[1, 1, 2, 2, 2, 1], [3, 3, 3, 0, 0, 0]], np.int32)
MEMORY_IDS = np.array([[2, 2, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0]], np.int32)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tokens(length=T):
    return normal(0, B, T, H, D), normal(1, B, length, K, D), normal(2, B, length, K, D)


def attended(arrays, *ids, **options):
    return softmax_attention(*map(jnp.asarray, arrays), *ids, **options)


def by_numpy(q, k, v, seen, bias=None, scale=D**-0.5):
    """Token by token; `seen` [B, T, A] says what a query sees, `bias` is [H, T, A]."""
    y = np.zeros(q.shape, np.float64)
    for b, t, h in np.ndindex(*q.shape[:3]):
        which = np.flatnonzero(seen[b, t])
        if len(which):
            score = scale * k[b, which, h * K // H].astype(np.float64) @ q[b, t, h]
            score += 0 if bias is None else bias[h, t, which]
            weight = np.exp(score - score.max())
            y[b, t, h] = weight @ v[b, which, h * K // H] / weight.sum()
    return y


def distance(length=T):
    return np.arange(T)[:, None] - np.arange(length)[None]


def same_run():
    run = np.cumsum(np.diff(IDS, axis=1, prepend=IDS[:, :1]) != 0, axis=1)
    return run[:, :, None] == run[:, None]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("segments", [False, True])
def test_directions_windows_and_segments(causal, window, segments):
    seen = np.ones((B, T, T), bool)
    seen &= distance() >= 0 if causal else True
    seen &= np.abs(distance()) < (window or T)
    seen &= same_run() if segments else True
    actual = attended(tokens(), jnp.asarray(IDS) if segments else None, causal=causal, window=window)
    np.testing.assert_allclose(actual, by_numpy(*tokens(), seen), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, H])
def test_biases_by_distance_and_whole(causal, heads):
    table, whole = normal(3, T if causal else 2 * T - 1, heads), normal(4, heads, T, T)
    bias = np.zeros((H, T, T))
    for t, s in np.ndindex(T, T):
        if t >= s or not causal:
            bias[:, t, s] = table[t - s + (0 if causal else T - 1)]
    seen = np.broadcast_to(distance() >= 0 if causal else np.ones((T, T), bool), (B, T, T))
    options = {"bias_XH": jnp.asarray(table), "bias_HTA": jnp.asarray(whole), "causal": causal, "score_scale": 1.0}
    np.testing.assert_allclose(
        attended(tokens(), **options), by_numpy(*tokens(), seen, bias + whole, scale=1.0), atol=1e-5
    )


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("memory_ids", [None, MEMORY_IDS])
@pytest.mark.parametrize("biased", [False, True])
def test_a_memory_of_another_length(ids, memory_ids, biased):
    if ids is not None and memory_ids is None:
        with pytest.raises(ValueError, match="segments of 6 queries and a memory of 9 tokens need memory_ids_BA"):
            attended(tokens(A), jnp.asarray(ids), causal=False)
        return
    seen = np.ones((B, T, A), bool)
    if memory_ids is not None:
        own = np.ones((B, T)) if ids is None else ids
        seen = (own[:, :, None] == memory_ids[:, None]) & (memory_ids != 0)[:, None]
    table = normal(3, T + A - 1, H)
    bias = np.moveaxis(table[distance(A) + A - 1], -1, 0) if biased else None
    options = {name: None if x is None else jnp.asarray(x) for name, x in (("memory_ids_BA", memory_ids),)}
    actual = attended(
        tokens(A),
        None if ids is None else jnp.asarray(ids),
        bias_XH=jnp.asarray(table) if biased else None,
        causal=False,
        **options,
    )
    np.testing.assert_allclose(actual, by_numpy(*tokens(A), seen, bias), atol=1e-5)


def test_nothing_leaks_from_padding_of_a_memory_nor_from_other_sequences():
    """The derivative is exactly 0, and there is no NaN where a query sees nothing."""
    q, k, v = map(jnp.asarray, tokens(A))

    def output(k, v):
        y = softmax_attention(q, k, v, jnp.asarray(IDS), memory_ids_BA=jnp.asarray(MEMORY_IDS), causal=False)
        return jnp.sum(jnp.sin(y[0, 0])) + jnp.sum(y[1, 4:] ** 2)

    for gradient in jax.grad(output, (0, 1))(k, v):
        assert np.all(np.isfinite(gradient))
        assert np.all(np.asarray(gradient)[0][MEMORY_IDS[0] != 1] == 0)
        assert np.all(np.asarray(gradient)[1] == 0)  # no token of the memory has id 0 or 3
        assert np.any(np.asarray(gradient)[0][MEMORY_IDS[0] == 1] != 0)


def test_what_does_not_fit_is_refused():
    for options, told in (
        ({"memory_ids_BA": jnp.ones((B, T), jnp.int32)}, "needs causal=False"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"bias_XH": jnp.zeros((T - 1, 1))}, "bias_XH needs at least 6 rows"),
        ({"bias_XH": jnp.zeros((T, 1)), "causal": False}, "bias_XH needs 11 rows"),
    ):
        with pytest.raises(ValueError, match=told):
            attended(tokens(), **options)


def test_over_a_mesh():
    """Rows and heads may be split with a bias and a memory; tokens not, in one line."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 3)
    options = {"bias_XH": jnp.asarray(normal(3, T + A - 1, H)), "memory_ids_BA": jnp.asarray(MEMORY_IDS)}
    options |= {"bias_HTA": jnp.asarray(normal(4, 1, T, A)), "causal": False}

    def attend(shards):
        return attended(tokens(A), jnp.asarray(IDS), **options, shards=shards)

    expected, actual = jax.jit(lambda: (attend(None), attend(Shards(mesh, ("data",), (), ("tensor",)))))()
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    with pytest.raises(ValueError, match="a memory or a bias is not for rows that are split over a mesh"):
        attend(Shards(mesh, ("data",), ("sequence",), ("tensor",)))


@pytest.mark.parametrize("length", [24, 25, 2])
def test_longlora_by_its_definition(length):
    """Token by token: which group of the row, or of the row shifted by half a group, and what came before in it."""
    q, k, v = random_heads(length)
    y = longlora_attention(q, k, v, split=3)
    G = -(-length // 3)
    for head in range(4):
        offset = 0 if head < 2 else G - (G + 1) // 2
        group = (np.arange(length) + offset) // G
        sees = (group[:, None] == group[None]) & np.tril(np.ones((length, length), bool))
        scores = np.where(sees, q[0, :, head] @ k[0, :, head // 2].T / 8**0.5, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        expected = weights / weights.sum(axis=-1, keepdims=True) @ v[0, :, head // 2]
        np.testing.assert_allclose(y[0, :, head], expected, atol=1e-5)


def test_released_longlora_sees_the_future():
    q, k, v = random_heads(24)

    def released(v):
        return longlora_attention(q, k, v, split=3, shift="released")[0, 0].sum()

    assert np.abs(jax.grad(released)(v)[0, -1]).max() > 0
    with pytest.raises(ValueError, match="multiple of 3"):
        longlora_attention(*random_heads(25), split=3, shift="released")
