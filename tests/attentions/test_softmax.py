"""Softmax attention of whole rows with a scale and a bias, by its definition, in both directions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.attentions.base import HeadSizes, Scoring
from lin_jax.attentions.quadratic import QuadraticAttention, QuadraticConfig
from lin_jax.attentions.softmax import SoftmaxAttention, SoftmaxConfig
from lin_jax.layers.rows import place
from lin_jax.ops.tree import tree_from_paths
from lin_jax.settings.base import ConfigError


def laplace(scores):
    """Ma et al., 2022, section 3.3."""
    return 0.5 * (1 + np.vectorize(math.erf)((scores - 0.5**0.5) / (2 * (4 * math.pi) ** -1) ** 0.5))


T, SIZES = 9, HeadSizes(2, 1, 4, 4)


def heads():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (1, T, count, 4)) for key, count in zip(keys, (2, 1, 1), strict=True)]


@pytest.mark.parametrize("kind", ["softmax", "quadratic"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_scale_and_a_bias_by_distance(kind, causal):
    (q, k, v), scale = heads(), 0.3
    bias_XH = jax.random.normal(jax.random.key(1), (T if causal else 2 * T - 1, 1))
    if kind == "softmax":
        module = SoftmaxAttention(SoftmaxConfig(causal=causal), SIZES, rngs=nnx.Rngs(0))
    else:
        module = QuadraticAttention(QuadraticConfig(causal=causal, local="laplace"), SIZES, rngs=nnx.Rngs(0))
    found = module(q, k, v, place(None, (1, T)), scoring=Scoring(scale, bias_XH))
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    seen = distance >= 0 if causal else np.ones((T, T), bool)
    for head in range(2):
        row = distance if causal else distance + T - 1
        scores = scale * np.asarray(q[0, :, head] @ k[0, :, 0].T) + np.asarray(bias_XH)[np.maximum(row, 0), 0]
        weights = np.where(seen, np.exp(scores) if kind == "softmax" else laplace(scores), 0)
        if kind == "softmax":
            weights = weights / weights.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(found[0, :, head], weights @ v[0, :, 0], atol=1e-5)


def by_definition(q, k, v, seen_TS, scale, bias_TSH):
    """Head by head, in float64."""
    q, k, v = (np.asarray(x[0], np.float64) for x in (q, k, v))
    y = np.zeros((*q.shape[:2], v.shape[-1]))
    for head in range(q.shape[1]):
        scores = scale * q[:, head] @ k[:, 0].T + bias_TSH[..., head]
        weights = np.where(seen_TS, np.exp(scores), 0)
        y[:, head] = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30) @ v[:, 0]
    return y


def test_a_bias_of_few_distances_holds_for_larger_ones_too():
    (q, k, v), bias_XH = heads(), jax.random.normal(jax.random.key(1), (7, 2))
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    for causal, zero in ((True, 0), (False, 3)):
        module = SoftmaxAttention(SoftmaxConfig(causal=causal), SIZES, rngs=nnx.Rngs(0))
        found = module(q, k, v, place(None, (1, T)), scoring=Scoring(0.3, bias_XH))
        bias_TSH = np.asarray(bias_XH)[np.clip(distance + zero, 0, 6)]
        seen = distance >= 0 if causal else np.ones((T, T), bool)
        np.testing.assert_allclose(found[0], by_definition(q, k, v, seen, 0.3, bias_TSH), atol=1e-5)


def test_a_cache_with_a_bias_is_the_whole_row():
    (q, k, v), module = heads(), SoftmaxAttention(SoftmaxConfig(), SIZES, rngs=nnx.Rngs(0))
    scoring = Scoring(0.7, jax.random.normal(jax.random.key(1), (5, 2)))
    whole = module(q, k, v, place(None, (1, T)), scoring=scoring)
    state = module.empty_state(SIZES, 1, "float32", 16)
    y, state = module.extend(q[:, :4], k[:, :4], v[:, :4], state, jnp.array([4]), scoring=scoring)
    np.testing.assert_allclose(y, whole[:, :4], atol=1e-5)
    # Two paths: the row's own tokens 4, 5, 6, and another token beside 5.
    tree = tree_from_paths([(0,), (0, 0), (1,)])
    path, nodes = tree.path_MQ[int(np.argmax(tree.depth_M))], np.full(4, 7)
    nodes[path] = [4, 5, 6]
    y, pending = module.verify(q[:, nodes], k[:, nodes], v[:, nodes], state, tree, scoring=scoring)
    np.testing.assert_allclose(y[:, path], whole[:, 4:7], atol=1e-5)
    state = module.commit(state, pending, jnp.asarray(path)[None], jnp.array([3]))
    after, _ = module.extend(q[:, 7:], k[:, 7:], v[:, 7:], state, jnp.array([2]), scoring=scoring)
    np.testing.assert_allclose(after, whole[:, 7:], atol=1e-5)


@pytest.mark.parametrize("S", [4, T, 23])
def test_another_sequence_of_another_length(S):
    q = heads()[0]
    k, v = (jax.random.normal(jax.random.key(seed), (1, S, 1, 4)) for seed in (5, 6))
    module = SoftmaxAttention(SoftmaxConfig(causal=False), SIZES, rngs=nnx.Rngs(0))
    real_BS = jnp.asarray(np.arange(S) % 3 != 1, jnp.int32)[None]
    rows, memory = place(None, (1, T)), place(real_BS, (1, S))
    found = module(q, k, v, rows, memory=memory, scoring=Scoring(0.4))
    seen = np.broadcast_to(np.asarray(real_BS) == 1, (T, S))
    np.testing.assert_allclose(found[0], by_definition(q, k, v, seen, 0.4, np.zeros((T, S, 2))), atol=1e-5)
    once = module.attend_memory(q, module.memory_state(k, v, memory), Scoring(0.4))
    np.testing.assert_allclose(once, found, atol=1e-6)


def test_what_it_cannot_do_is_told_in_a_line():
    assert "predicts no next token" in str(SoftmaxAttention.undecodable(SoftmaxConfig(causal=False)))
    quadratic = QuadraticAttention(QuadraticConfig(), SIZES, rngs=nnx.Rngs(0))
    rows = place(None, (1, T))
    with pytest.raises(ConfigError, match="attention.kind=quadratic has no form for the tokens of another sequence"):
        quadratic(*heads(), rows, memory=rows)
    with pytest.raises(ConfigError, match="attention.kind=quadratic has no form for the tokens of another sequence"):
        quadratic.memory_state(*heads()[1:], rows)
