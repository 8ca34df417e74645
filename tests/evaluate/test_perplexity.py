"""Perplexity: every token once, whatever window, stride and batch; equal to one window at a time without padding."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from lin_jax.evaluate.perplexity import Perplexity, make_scorer, measure, windows
from lin_jax.experiment import AugmentedConfig, ConfigError, FlashConfig, MeshConfig
from lin_jax.models.registry import create_model
from lin_jax.train.sharding import make_partition

pytestmark = pytest.mark.usefixtures("quick_compilation")

VOCABULARY, START = 50, 49
CONFIG = FlashConfig(
    vocabulary_size=VOCABULARY,
    width=16,
    depth=2,
    query_key_size=8,
    rotary_size=4,
    attention=AugmentedConfig(group_size=4, convolution=3),
)


@pytest.fixture(scope="module")
def model():
    model = create_model(CONFIG, nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    noisy = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), state)
    nnx.update(model, noisy)
    return model


@pytest.fixture(scope="module")
def documents():
    random = np.random.default_rng(0)
    lengths = [1, 2, 3, 5, 7, 8, 9, 16, 23, 40, 1]
    return [(random.integers(0, VOCABULARY, size).astype(np.int32), 3 * size) for size in lengths]


@pytest.fixture(scope="module")
def naive(model, documents):
    """Nats of a text by its definition: for each token, the longest allowed context, one forward pass a window."""
    graph, state = nnx.split(model)
    logits = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))

    def nats(window, stride):
        total = 0.0
        for targets, _ in documents:
            inputs = np.concatenate(([START], targets[:-1])).astype(np.int32)
            done = 0
            while done < len(targets):
                start = 0 if done == 0 else done + stride - window
                end = min(start + window, len(targets))
                # A causal model gives the same for what follows: repeat lengths, so that less is compiled.
                padded = np.zeros(math.ceil((end - start) / 8) * 8, np.int32)
                padded[: end - start] = inputs[start:end]
                out = logits(state, jnp.asarray(padded)[None])[0, : end - start]
                losses = optax.softmax_cross_entropy_with_integer_labels(out, jnp.asarray(targets[start:end]))
                total += float(np.asarray(losses, np.float64)[done - start :].sum())
                done = end
        return total

    return nats


@pytest.mark.parametrize(
    ("window", "stride", "batch_size"), [(64, 64, 8), (8, 8, 8), (8, 4, 16), (8, 3, 8), (8, 1, 24), (16, 5, 8)]
)
def test_equal_to_one_window_at_a_time(model, documents, naive, window, stride, batch_size):
    score = make_scorer(model, make_partition(MeshConfig()), chunk=5)
    result = measure(score, iter(documents), START, window=window, stride=stride, batch_size=batch_size)
    tokens = sum(len(ids) for ids, _ in documents)
    assert (result.documents, result.tokens, result.bytes) == (len(documents), tokens, 3 * tokens)
    assert abs(result.loss - naive(window, stride) / tokens) < 1e-5
    np.testing.assert_allclose(result.perplexity, math.exp(result.loss))
    np.testing.assert_allclose(result.bits_per_byte, result.loss / math.log(2) / 3)


def test_more_context_is_not_the_same_text(naive):
    """The cases above differ, so that agreeing with each of them means something."""
    values = [naive(64, 64), naive(8, 8), naive(8, 4)]
    assert all(abs(a - b) > 1e-2 for a, b in itertools.combinations(values, 2))


@given(length=st.integers(1, 300), window=st.integers(1, 64), stride=st.integers(1, 64))
def test_windows_score_every_position_once_with_enough_context(length, window, stride):
    stride = min(stride, window)
    parts = list(windows(length, window, stride))
    scored = [position for _, first, end in parts for position in range(first, end)]
    assert scored == list(range(length))
    assert all(start <= first < end <= start + window for start, first, end in parts)
    assert all(first - start == window - stride for start, first, _ in parts[1:])


@pytest.mark.parametrize(("window", "stride"), [(8, 0), (8, 9), (0, 0), (8, -1)])
def test_a_window_that_cannot_be_is_told(window, stride):
    with pytest.raises(ConfigError, match="must"):
        measure(lambda batch: None, [], START, window=window, stride=stride, batch_size=1)


def test_no_text_is_told():
    with pytest.raises(ConfigError, match="no text"):
        measure(lambda batch: None, [], START, window=8, stride=8, batch_size=1)


def test_an_overflowing_perplexity_is_infinite():
    assert Perplexity(documents=1, tokens=1, bytes=1, nll=1e4, seconds=1.0).perplexity == math.inf
