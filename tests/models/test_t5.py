"""T5: what its tokens see, padding, lengths of source and target that differ, and decoding, for each attention."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings

from lin_jax.decode.memory import bytes_of
from lin_jax.experiment import AugmentedConfig, ConfigError, ReleasedT5Config, SoftmaxConfig, T5Config
from lin_jax.layers.partition import WHOLE
from lin_jax.models.base import unstacked
from lin_jax.models.encoder_decoder import shift_right
from lin_jax.models.registry import create_model
from lin_jax.ops.tree import tree_from_paths

pytestmark = pytest.mark.usefixtures("quick_compilation")

V, G = 40, 4
LINEAR = {"group_size": G, "convolution": 3}
# The attentions of the decoder to itself, of the encoder, and of the decoder to the source.
ATTENTIONS = {
    "softmax": (SoftmaxConfig(), SoftmaxConfig(causal=False), SoftmaxConfig(causal=False)),
    "augmented": (
        AugmentedConfig(**LINEAR),
        AugmentedConfig(causal=False, **LINEAR),
        AugmentedConfig(causal=False, **LINEAR),
    ),
    "softmax_local": (
        AugmentedConfig(local="softmax", local_groups=2, **LINEAR),
        AugmentedConfig(local="softmax", causal=False, feature_map="elu1", **LINEAR),
        SoftmaxConfig(causal=False),
    ),
    "linear_cross": (
        SoftmaxConfig(),
        SoftmaxConfig(causal=False),
        AugmentedConfig(causal=False, feature_map="relu", grouped_weight="one", **LINEAR),
    ),
    "hybrid": (
        AugmentedConfig(softmax_layers=(1,), local_weight="learned", **LINEAR),
        AugmentedConfig(softmax_layers=(0,), causal=False, castling=True, **LINEAR),
        AugmentedConfig(softmax_layers=(0,), causal=False, **LINEAR),
    ),
}


def make_config(name, **changes):
    own, encoder, cross = ATTENTIONS[name]
    sizes = {"vocabulary_size": V, "width": 12, "depth": 2, "encoder_depth": 3, "heads": 2, "head_size": 5}
    return T5Config(
        **{**sizes, "feed_forward_size": 16, "bias_buckets": 8, "bias_distance": 12, **changes},
        attention=own,
        encoder_attention=encoder,
        cross_attention=cross,
    )


def make_model(config):
    """A model whose parameters are all far from their start, the new ones too."""
    model, rng = create_model(config, nnx.Rngs(0)), np.random.default_rng(1)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32), state))
    return model


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_no_token_sees_later_ones_or_padding(name):
    """By gradients: those of embeddings of what is not seen are exactly 0, and all others are not."""
    model = make_model(make_config(name, tie_embeddings=False))
    S, T = 9, 7
    # No token comes twice.
    source, target = jnp.arange(S)[None], S + jnp.arange(T)[None]
    real = jnp.array([[0, 1, 1, 1, 1, 1, 1, 0, 0]])
    graph, embedding, rest = nnx.split(model, lambda path, _: path[0] == "embedding", ...)
    weight = jax.random.normal(jax.random.key(0), (12,))

    def output(embedding, t):
        model = nnx.merge(graph, embedding, rest)
        return model.features(target, memory=model.encode(source, real))[0, t] @ weight

    for t in (0, 3, 6):
        gradient = np.abs(jax.grad(output)(embedding, t)["embedding"][...]).sum(1)
        assert (gradient[S + t + 1 : S + T] == 0).all()
        assert (gradient[[0, 7, 8]] == 0).all()
        assert (gradient[S : S + t + 1] > 0).all()
        assert (gradient[1:7] > 0).all()


@pytest.mark.parametrize("name", ATTENTIONS)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_padding_changes_nothing(name, data):
    model = make_model(make_config(name))
    # Few lengths, as each is a program of its own: within a group, one, and more.
    S, T = data.draw(st.sampled_from([1, 4, 9])), data.draw(st.sampled_from([1, 4, 9]))
    before, target_before = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    source, target = tokens(1, S, seed=S), tokens(1, T, seed=20 + T)
    alone = model(jnp.asarray(source), jnp.asarray(target))

    def padded(row, first, length):
        filled, ids = tokens(1, length, seed=99), np.zeros((1, length), np.int32)
        filled[:, first : first + row.shape[1]], ids[:, first : first + row.shape[1]] = row, 1
        return jnp.asarray(filled), jnp.asarray(ids)

    (source_BS, source_ids), (target_BT, ids) = padded(source, before, 13), padded(target, target_before, 12)
    found = model(source_BS, target_BT, source_ids, ids)[:, target_before : target_before + T]
    np.testing.assert_allclose(found, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_decoding_gives_what_whole_rows_give(name):
    """In chunks, and along every path of a tree, behind sources of different lengths."""
    model = make_model(make_config(name))
    decoder, sources, target = unstacked(model), [11, 2, 6], tokens(3, 14, seed=3)
    source_BS, real_BS = np.zeros((3, 13), np.int32), np.zeros((3, 13), np.int32)
    whole = []
    for row, length in enumerate(sources):
        source_BS[row, -length:], real_BS[row, -length:] = tokens(length, seed=row), 1
        memory = model.encode(jnp.asarray(source_BS[row : row + 1, -length:]))
        whole.append(model.features(jnp.asarray(target[row : row + 1]), memory=memory)[0])
    whole = np.stack(whole)
    state = decoder.start(jnp.asarray(source_BS), jnp.asarray(real_BS), 20)
    # Chunks of one length, for one program; groups have four tokens.
    for start, stop in ((0, 3), (3, 6), (6, 9)):
        x_BTC, state = decoder.forward(jnp.asarray(target[:, start:stop]), state)
        np.testing.assert_allclose(x_BTC, whole[:, start:stop], rtol=0, atol=2e-5)
    tree = tree_from_paths([[0], [1], [0, 0], [0, 0, 0], [0, 1]])
    path = tree.path_MQ[int(np.argmax(tree.depth_M))][: int(tree.depth_M.max()) + 1]
    nodes = tokens(3, tree.nodes, seed=7)
    nodes[:, path] = target[:, 9 : 9 + len(path)]
    x_BMC, pending = decoder.verify(jnp.asarray(nodes), tree, state)
    np.testing.assert_allclose(x_BMC[:, path], whole[:, 9 : 9 + len(path)], rtol=0, atol=2e-5)
    taken = jnp.broadcast_to(jnp.asarray(path, jnp.int32), (3, len(path)))
    state = decoder.commit(state, pending, taken, jnp.full(3, 2))
    state = decoder.take(state, jnp.arange(3))
    x_BTC, _ = decoder.forward(jnp.asarray(target[:, 11:]), state)
    np.testing.assert_allclose(x_BTC, whole[:, 11:], rtol=0, atol=2e-5)


def test_a_linear_memory_is_as_large_for_any_source():
    model = create_model(make_config("augmented"), nnx.Rngs(0))

    sizes = {bytes_of(lambda S=S: model.start(jnp.zeros((1, S), jnp.int32), None, 16)) for S in (100, 10_000)}
    assert len(sizes) == 1


def test_the_bias_is_that_of_the_distance():
    """Far tokens share a bucket; near ones, before and behind, have their own."""
    model = make_model(make_config("softmax"))
    x, rows, bias = model.begin_source(jnp.zeros((1, 3), jnp.int32), None, WHOLE)
    assert x.shape == (1, 3, 12) and rows.segment_ids_BT is None
    table, far = np.asarray(model.encoder_bias[...]), model.config.bias_distance
    np.testing.assert_array_equal(bias[far], table[0])  # the token itself
    np.testing.assert_array_equal(bias[far + 1], table[1])  # the one before it
    np.testing.assert_array_equal(bias[far - 1], table[5])  # the one behind it: the upper half of the buckets
    np.testing.assert_array_equal(bias[-1], table[3])


def test_targets_are_shifted():
    rows, ids = jnp.array([[5, 6, 7], [0, 8, 9]]), jnp.array([[1, 1, 1], [0, 1, 1]])
    np.testing.assert_array_equal(shift_right(rows, None, 3), [[3, 5, 6], [3, 0, 8]])
    np.testing.assert_array_equal(shift_right(rows, ids, 3)[1, 1:], [3, 8])


def test_classes_are_read_at_the_end_of_the_text():
    model = make_model(make_config("augmented", labels=3))
    row = tokens(1, 6)
    alone = model.classify(jnp.asarray(row))
    assert alone.shape == (1, 3)
    for pad in ((0, 4), (3, 0)):
        padded = jnp.pad(jnp.asarray(row), ((0, 0), pad), constant_values=7)
        found = model.classify(padded, jnp.pad(jnp.ones((1, 6), jnp.int32), ((0, 0), pad)))
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"start_token": V}, f"start_token={V} is no token"),
        ({"bias_buckets": 6}, "bias_buckets must be a positive multiple of 4"),
        ({"encoder_attention": SoftmaxConfig()}, "encoder_attention.causal=true is not for t5"),
        ({"attention": SoftmaxConfig(causal=False)}, "attention.causal=false is not for models"),
        ({"cross_attention": AugmentedConfig(causal=False, softmax_layers=(2,))}, "names a layer that depth=2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(make_config("softmax"), **changes)


def test_the_released_form_says_what_it_cannot_do():
    released = ReleasedT5Config(causal=False, group_size=G)
    model = create_model(dataclasses.replace(make_config("softmax"), cross_attention=released), nnx.Rngs(0))
    with pytest.raises(ConfigError, match="cross_attention: kind=released_t5 reads whole rows"):
        model.start(jnp.zeros((1, 4), jnp.int32), None, 8)
    with pytest.raises(ConfigError, match="2 of the target and 1 of the source"):
        model(jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 5), jnp.int32))


def test_a_source_is_asked_for():
    model = create_model(make_config("softmax"), nnx.Rngs(0))
    with pytest.raises(ConfigError, match="t5 reads a source"):
        model.features(jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(ConfigError, match="t5 reads a source"):
        model.empty_state(1, 4)
