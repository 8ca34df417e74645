"""GPT-2: its positions, and classification."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.experiment import ConfigError
from lin_jax.models.registry import create_model
from tests.models.transformers import AUGMENTED, LENGTH, SOFTMAX, T, make_config, make_model

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_gpt2_refuses_rows_beyond_its_positions():
    model = create_model(make_config("gpt2", SOFTMAX), nnx.Rngs(0))
    with pytest.raises(ConfigError, match="rows of 25 tokens"):
        model.features(jnp.zeros((1, T + 1), jnp.int32))


def test_classification_reads_the_last_real_token():
    config = dataclasses.replace(make_config("gpt2", AUGMENTED), labels=5)
    model = make_model(config)
    tokens = jnp.arange(LENGTH)[None]
    alone = model.classify(tokens)
    assert alone.shape == (1, 5)
    left, right = (jnp.pad(tokens, ((0, 0), pad)) for pad in ((4, 0), (0, 4)))
    ones = jnp.ones((1, LENGTH), jnp.int32)
    np.testing.assert_allclose(model.classify(left, jnp.pad(ones, ((0, 0), (4, 0)))), alone, atol=1e-5)
    np.testing.assert_allclose(model.classify(right, jnp.pad(ones, ((0, 0), (0, 4)))), alone, atol=1e-5)
