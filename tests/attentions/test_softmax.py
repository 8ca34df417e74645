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


def test_what_it_cannot_do_is_told_in_a_line():
    module = SoftmaxAttention(SoftmaxConfig(), SIZES, rngs=nnx.Rngs(0))
    state = module.empty_state(SIZES, 1, "float32", 16)
    with pytest.raises(ConfigError, match="a scale or a bias of the model's own cannot be decoded yet"):
        module.extend(*heads(), state, jnp.array([T]), scoring=Scoring(1.0))
    assert "predicts no next token" in str(SoftmaxAttention.undecodable(SoftmaxConfig(causal=False)))
