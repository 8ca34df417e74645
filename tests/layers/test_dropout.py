"""Dropout: what is dropped, in training alone, the same for the same key, and its gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.experiment import ConfigError
from lin_jax.layers.dropout import dropout, split_key
from lin_jax.layers.stack import run_layers
from tests.models import test_bert, test_t5
from tests.models.test_t5 import make_model
from tests.models.transformers import AUGMENTED
from tests.models.transformers import make_config as make_transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")

RATE = 0.3
CONFIGS = {
    "gpt2": make_transformer("gpt2", AUGMENTED),
    "bert": test_bert.make_config("augmented"),
    "t5": test_t5.make_config("augmented"),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return dataclasses.replace(CONFIGS[request.param], dropout=RATE, labels=3)


def run(model, key=None):
    rows = jnp.arange(8, dtype=jnp.int32)[None] % model.config.vocabulary_size
    return model.classify(rows, jnp.ones_like(rows), dropout_key=key)


def test_parts_are_dropped_and_the_mean_stays():
    x = jnp.ones((200, 500))
    y = dropout(x, RATE, jax.random.key(0))
    # 5 standard deviations of 100,000 draws.
    assert abs(float(jnp.mean(y == 0)) - RATE) < 5 * (RATE * (1 - RATE) / x.size) ** 0.5
    np.testing.assert_allclose(y[y != 0], 1 / (1 - RATE), rtol=1e-6)
    assert dropout(x, RATE, None) is x and dropout(x, 0.0, jax.random.key(0)) is x
    assert dropout(x.astype(jnp.bfloat16), RATE, jax.random.key(0)).dtype == jnp.bfloat16
    assert split_key(None, 2) == [None, None] and len(set(map(str, split_key(jax.random.key(1), 3)))) == 3


def test_without_a_key_a_model_with_dropout_is_one_without(config):
    model = make_model(config)
    graph, state = nnx.split(model)
    plain = make_model(dataclasses.replace(config, dropout=0.0))
    np.testing.assert_array_equal(run(nnx.merge(graph, state)), run(plain))


def test_a_key_decides_what_is_dropped(config):
    model = make_model(config)
    first, again, other = (run(model, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3 and np.abs(first - run(model)).max() > 1e-3


def test_layers_drop_other_parts():
    """Layers that are all alike, but for their keys."""

    class Layer(nnx.Module):
        def __init__(self):
            self.one = nnx.Param(jnp.ones((4, 1)))

        def __call__(self, x, *, dropout_key=None):
            return x + dropout(self.one.reshape(1, 1, 1) * jnp.ones_like(x), 0.5, dropout_key)

    x = jnp.zeros((1, 1, 400))
    found = np.asarray(run_layers(Layer(), x, dropout_key=jax.random.key(0)))[0, 0]
    # Of four layers that each add 0 or 2, equal ones would give 0 or 8 alone.
    values, counts = np.unique(found, return_counts=True)
    np.testing.assert_array_equal(values, [0, 2, 4, 6, 8])
    assert np.abs(counts / 400 - np.array([1, 4, 6, 4, 1]) / 16).max() < 0.1


def test_the_gradient_is_that_of_what_was_kept(config):
    """Against a finite difference, with one key."""
    model, key = make_model(config), jax.random.key(3)
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    random = np.random.default_rng(0)
    step = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), jnp.float32), state)

    def loss(size):
        moved = jax.tree.map(lambda leaf, direction: leaf + size * direction, state, step)
        return jnp.sum(jnp.sin(run(nnx.merge(graph, moved, rest), key)))

    slope = jax.grad(loss)(0.0)
    size = 1e-3
    np.testing.assert_allclose(slope, (loss(size) - loss(-size)) / (2 * size), rtol=2e-2, atol=2e-3)


def test_a_rate_that_is_no_part_is_refused(config):
    with pytest.raises(ConfigError, match=r"dropout must lie in \[0, 1\), but is 1"):
        dataclasses.replace(config, dropout=1.0)
