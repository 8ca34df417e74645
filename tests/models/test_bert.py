"""BERT: what its tokens see, padding, documents in one row, heads, and vectors of sentences, for each attention."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings

import lin_jax
from lin_jax.data.tokenizers import BytesTokenizer
from lin_jax.evaluate.embed import pool
from lin_jax.experiment import AugmentedConfig, BertConfig, ConfigError, SoftmaxConfig
from lin_jax.models.registry import create_model
from tests.models import test_t5
from tests.models.test_t5 import make_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

V, G = 40, 4
LINEAR = {"group_size": G, "convolution": 3, "causal": False}
ATTENTIONS = {
    "softmax": SoftmaxConfig(causal=False),
    "augmented": AugmentedConfig(**LINEAR),
    "softmax_local": AugmentedConfig(local="softmax", local_groups=2, feature_map="elu1", **LINEAR),
    "laplace": AugmentedConfig(local="laplace", local_weight="learned", normalise_grouped=True, **LINEAR),
    "hybrid": AugmentedConfig(softmax_layers=(1,), castling=True, **LINEAR),
    "grouped": AugmentedConfig(local="none", feature_map="relu", **{**LINEAR, "convolution": 0}),
}


def make_config(name, **changes):
    sizes = {"vocabulary_size": V, "width": 12, "depth": 2, "heads": 2, "feed_forward_size": 16, "positions": 16}
    return BertConfig(**{**sizes, **changes}, attention=ATTENTIONS[name])


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_no_token_sees_padding_or_another_document(name):
    """By gradients of embeddings: exactly 0 for what is not seen, and not 0 for all others, later ones too."""
    model = make_model(make_config(name))
    row, ids = jnp.arange(12)[None], jnp.array([[0, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 0]])
    graph, embedding, rest = nnx.split(model, lambda path, _: path[0] == "embedding", ...)
    weight = jax.random.normal(jax.random.key(0), (12,))

    def output(embedding, t):
        return nnx.merge(graph, embedding, rest).features(row, ids)[0, t] @ weight

    for t, own in ((2, range(1, 6)), (8, range(7, 11))):
        gradient = np.abs(jax.grad(output)(embedding, t)["embedding"][...]).sum(1)[:12]
        assert (gradient[list(own)] > 0).all()
        assert (np.delete(gradient, list(own)) == 0).all()


@pytest.mark.parametrize("name", ATTENTIONS)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_padding_and_other_documents_change_nothing(name, data):
    model = make_model(make_config(name, labels=3))
    # Few lengths, as each is a program of its own.
    lengths = [data.draw(st.sampled_from([1, 4, 6])) for _ in range(2)]
    gaps = [data.draw(st.integers(0, 2)) for _ in range(2)]
    row, ids, types = tokens(1, 16, seed=9), np.zeros((1, 16), np.int32), tokens(1, 16, seed=3) % 2
    start, places = 0, []
    for number, (length, gap) in enumerate(zip(lengths, gaps, strict=True), 1):
        start += gap
        ids[0, start : start + length] = number
        places.append(slice(start, start + length))
        start += length
    whole = model.features(jnp.asarray(row), jnp.asarray(ids), token_types_BT=jnp.asarray(types))
    for place in places:
        alone = model.features(jnp.asarray(row[:, place]), token_types_BT=jnp.asarray(types[:, place]))
        np.testing.assert_allclose(whole[:, place], alone, rtol=0, atol=2e-5)
    only = jnp.asarray(np.where(ids == 1, ids, 0))
    classes = model.classify(jnp.asarray(row), only, token_types_BT=jnp.asarray(types))
    first = {"token_types_BT": jnp.asarray(types[:, places[0]])}
    np.testing.assert_allclose(classes, model.classify(jnp.asarray(row[:, places[0]]), **first), rtol=0, atol=2e-5)


def test_types_and_positions_count():
    model = make_model(make_config("softmax"))
    row = jnp.asarray(np.full((1, 6), 7, np.int32))
    plain = model.features(row)
    assert np.abs(plain[0, 1] - plain[0, 2]).max() > 1e-3
    other = model.features(row, token_types_BT=jnp.ones((1, 6), jnp.int32))
    assert np.abs(plain - other).max() > 1e-3


def test_heads_are_those_of_the_settings():
    model = create_model(make_config("softmax", tie_embeddings=False, next_sentence=True, labels=2), nnx.Rngs(0))
    assert model(jnp.zeros((2, 5), jnp.int32)).shape == (2, 5, V)
    assert model.logits.kernel.shape == (12, V) and model.next_sentence.kernel.shape == (12, 2)
    plain = create_model(make_config("softmax", pooler=False, masked_head=False), nnx.Rngs(0))
    assert plain(jnp.zeros((2, 5), jnp.int32)).shape == (2, 5, 12)
    assert not hasattr(plain, "pooler") and not hasattr(plain, "masked_head")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"heads": 5}, "width=12 is not divisible by heads=5"),
        ({"labels": 2, "pooler": False}, "labels need a pooler"),
        ({"attention": SoftmaxConfig()}, "attention.causal=true is not for bert"),
        ({"token_types": 0}, "token_types must be greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(make_config("softmax"), **changes)


def test_rows_beyond_the_positions_are_refused():
    model = create_model(make_config("softmax"), nnx.Rngs(0))
    with pytest.raises(ConfigError, match="rows of 17 tokens are longer than the model's positions=16"):
        model.features(jnp.zeros((1, 17), jnp.int32))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_means_or_first_features(pooling):
    model, tokenizer = make_model(make_config("augmented", vocabulary_size=257)), BytesTokenizer()
    texts = ["a sentence", "b", "cc dd"]
    found = lin_jax.embed(model, tokenizer, texts, pooling=pooling, batch_size=2)
    for row, text in zip(found, texts, strict=True):
        features = model.features(jnp.asarray(tokenizer.encode(text))[None])[0]
        np.testing.assert_allclose(row, features.mean(0) if pooling == "mean" else features[0], rtol=0, atol=1e-5)
    assert lin_jax.embed(model, tokenizer, []).shape == (0, 12)


def test_vectors_do_not_hold_padding():
    x, ids = jnp.full((1, 3, 2), jnp.nan).at[0, 1].set(2.0), jnp.array([[0, 1, 0]])
    np.testing.assert_array_equal(pool(x, ids, "mean"), [[2.0, 2.0]])
    np.testing.assert_array_equal(pool(x, ids, "cls"), [[2.0, 2.0]])


def test_vectors_are_refused_where_there_are_none():
    decoder = create_model(test_t5.make_config("softmax"), nnx.Rngs(0))
    with pytest.raises(ConfigError, match="such as bert, but this is a t5"):
        lin_jax.embed(decoder, BytesTokenizer(), ["a"])
    model = create_model(make_config("softmax"), nnx.Rngs(0))
    with pytest.raises(ConfigError, match="pooling must be mean or cls, but is max"):
        lin_jax.embed(model, BytesTokenizer(), ["a"], pooling="max")
    with pytest.raises(ConfigError, match="put it in a list"):
        lin_jax.embed(model, BytesTokenizer(), "a")
