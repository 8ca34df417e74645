"""LLaMA and GPT-2 with every kind of attention: no leaks, no trace of padding, hybrids, rotary scaling, LongLoRA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.experiment import (
    AugmentedConfig,
    ConfigError,
    Gpt2Config,
    LlamaConfig,
    LongloraConfig,
    RopeConfig,
    SoftmaxConfig,
)
from lin_jax.layers.rope import rotation
from lin_jax.layers.rows import place
from lin_jax.models.flops import training_flops_per_token
from lin_jax.models.registry import create_model
from lin_jax.ops.softmax_attention.api import longlora_attention, softmax_attention

pytestmark = pytest.mark.usefixtures("quick_compilation")

T, LENGTH = 24, 10
SEGMENTS = np.array([0, 0, *[3] * LENGTH, *[1] * LENGTH, 0, 0], np.int32)
SOFTMAX = SoftmaxConfig()
AUGMENTED = AugmentedConfig(group_size=4, convolution=3)
ATTENTION = {
    "softmax": SOFTMAX,
    "augmented": AUGMENTED,
    "softmax_local": dataclasses.replace(AUGMENTED, local="softmax", local_groups=2),
    "hybrid": dataclasses.replace(AUGMENTED, softmax_layers=(1,)),
    "longlora": LongloraConfig(split=3),
}


def make_config(family, attention):
    if family == "gpt2":
        return Gpt2Config(
            vocabulary_size=T, width=16, depth=3, heads=4, feed_forward_size=32, positions=T, attention=attention
        )
    return LlamaConfig(
        vocabulary_size=T,
        width=16,
        depth=3,
        heads=4,
        key_value_heads=2,
        head_size=6,
        feed_forward_size=24,
        attention=attention,
    )


def make_model(config):
    """A model whose parameters are all far from their start, the new ones too."""
    model = create_model(config, nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), state))
    return model


def sensitivity(model, segments):
    """(features, whether the features of each position depend on each token), of one row of T different tokens."""
    graph, state = nnx.split(model)
    direction = jax.random.normal(jax.random.key(2), (T, model.config.width))

    @jax.jit
    def run(state):
        def features(state):
            hidden_TC = nnx.merge(graph, state).features(jnp.arange(T)[None], segments)[0]
            return jnp.sum(hidden_TC * direction, axis=-1), hidden_TC

        _, pullback, hidden_TC = jax.vjp(features, state, has_aux=True)
        by_token = nnx.to_pure_dict(jax.vmap(pullback)(jnp.eye(T))[0])["embedding"]
        return hidden_TC, jnp.abs(by_token).max(axis=-1)

    hidden_TC, by_token = run(state)
    return np.asarray(hidden_TC), np.asarray(by_token)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "softmax"),
        ("llama", "augmented"),
        ("llama", "softmax_local"),
        ("llama", "longlora"),
        ("gpt2", "softmax"),
        ("gpt2", "hybrid"),
    ],
)
def test_packed_documents_are_alone(family, kind):
    """Gradients from later tokens, other documents and padding are exactly 0; features are those without padding."""
    model = make_model(make_config(family, ATTENTION[kind]))
    if kind == "longlora":  # Its groups belong to the row, so only its leaks are tested here.
        hidden, by_token = sensitivity(model, None)
        sees = np.tril(np.ones((T, T), bool))
        assert not by_token[~sees].any() and (np.diag(by_token) > 0).all()
    else:
        hidden, by_token = sensitivity(model, jnp.asarray(SEGMENTS)[None])
        for start in (2, 2 + LENGTH):
            alone = model.features(jnp.arange(start, start + LENGTH)[None])[0]
            np.testing.assert_allclose(hidden[start : start + LENGTH], alone, atol=2e-5)
    same = (SEGMENTS[:, None] == SEGMENTS[None]) & (SEGMENTS != 0)[:, None]
    sees = same & np.tril(np.ones((T, T), bool))
    if kind == "longlora":
        _, by_token = sensitivity(model, jnp.asarray(SEGMENTS)[None])
    real = SEGMENTS != 0
    assert not by_token[real][~sees[real]].any()
    # Over three layers a token that is not hidden by the group's size is seen.
    assert (np.diag(by_token)[real] > 0).all() and (by_token[sees] > 0).mean() > (0.6 if kind == "longlora" else 0.99)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hybrid_layers_one_by_one(family):
    attention = dataclasses.replace(AUGMENTED, softmax_layers=(0, 2))
    model = make_model(make_config(family, attention))
    assert attention.kinds(4) == ["softmax", "augmented", "softmax", "augmented"]
    tokens = jnp.arange(T)[None]
    rows = place(None, (1, T))
    x = model.embedding[...][tokens]
    shared = (rows,)
    if family == "llama":
        shared = (rows, rotation(model.config.rope, rows.position_BT, model.config.head_size, 1))
    else:
        x = x + model.position_embedding[...][rows.position_BT]
    graph, arrays = nnx.split(model.layers)
    for number, kind in enumerate(("softmax", "augmented", "softmax")):
        layer = nnx.merge(graph, jax.tree.map(lambda a, i=number: a[i], arrays))
        x = layer.of_kind(kind)(x, *shared)
    np.testing.assert_allclose(model.features(tokens), model.norm(x), atol=1e-5)


def test_rematerialisation_changes_nothing():
    config = make_config("llama", ATTENTION["hybrid"])
    tokens = jnp.arange(T)[None]
    gradients = []
    for remat in ("none", "full"):
        graph, state = nnx.split(make_model(dataclasses.replace(config, remat=remat)))

        def loss(state, graph=graph):
            return jnp.mean(jnp.square(nnx.merge(graph, state)(tokens)))

        gradients.append(jax.tree.leaves(jax.jit(jax.grad(loss))(state)))
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_fresh_linearized_layers_leave_new_parameters_at_their_start():
    mixing = create_model(make_config("llama", AUGMENTED), nnx.Rngs(0)).layers.attention.mixing
    assert mixing.alpha.shape == (3,) and mixing.filter.shape == (3, 3, 4)
    assert not np.asarray(mixing.alpha[...]).any() and not np.asarray(mixing.filter[...]).any()


def test_bfloat16_activations():
    model = make_model(dataclasses.replace(make_config("llama", AUGMENTED), dtype="bfloat16"))
    features = model.features(jnp.arange(T)[None])
    assert features.dtype == jnp.bfloat16 and model.head(features).dtype == jnp.float32


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


def expected_angles(rope, head_size, positions, length):
    """Hugging Face's rules, one frequency at a time."""
    theta, angles = rope.theta, np.zeros((length, head_size // 2))
    if rope.scaling == "dynamic" and length > positions:
        theta *= (rope.factor * length / positions - (rope.factor - 1)) ** (head_size / (head_size - 2))
    for index in range(head_size // 2):
        frequency = theta ** (-2 * index / head_size)
        wavelength = 2 * np.pi / frequency
        if rope.scaling == "linear":
            frequency /= rope.factor
        if rope.scaling == "llama3" and wavelength > rope.original_positions / rope.low_frequency_factor:
            frequency /= rope.factor
        elif rope.scaling == "llama3" and wavelength >= rope.original_positions / rope.high_frequency_factor:
            low, high = rope.low_frequency_factor, rope.high_frequency_factor
            smooth = (rope.original_positions / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / rope.factor + smooth * frequency
        angles[:, index] = frequency * np.arange(length)
    return angles


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(theta=500.0),
        RopeConfig(scaling="linear", factor=4.0),
        RopeConfig(scaling="dynamic", factor=2.0),
        RopeConfig(scaling="llama3", factor=8.0, original_positions=64, theta=1000.0),
    ],
    ids=lambda rope: rope.scaling,
)
@pytest.mark.parametrize("length", [20, 50])
def test_rotary_scaling(rope, length):
    position = jnp.concatenate([jnp.arange(length), jnp.arange(7)])[None]
    turn = rotation(rope, position, 16, 32)
    for part, expected in ((turn.cos_BTD, np.cos), (turn.sin_BTD, np.sin)):
        np.testing.assert_allclose(part[0, :length], expected(expected_angles(rope, 16, 32, length)), atol=2e-5)
        # A short document beside a long one keeps its own scaling.
        np.testing.assert_allclose(part[0, length:], expected(expected_angles(rope, 16, 32, 7)), atol=2e-5)


def random_heads(length, key_value_heads=2):
    keys = jax.random.split(jax.random.key(3), 3)
    heads = (4, key_value_heads, key_value_heads)
    return [jax.random.normal(key, (1, length, h, 8)) for key, h in zip(keys, heads, strict=True)]


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


def test_softmax_attention_with_shared_keys():
    q, k, v = random_heads(9)
    scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, axis=2)) / 8**0.5
    scores = jnp.where(jnp.tril(jnp.ones((9, 9), bool))[None, None], scores, -jnp.inf)
    expected = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), jnp.repeat(v, 2, axis=2))
    np.testing.assert_allclose(softmax_attention(q, k, v), expected, atol=1e-5)


def test_operations_are_counted():
    """LLaMA-2-7B: 6 operations a parameter and token but for the embedding, and the scores."""
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    softmax = LlamaConfig(attention=SOFTMAX)
    assert training_flops_per_token(softmax, 4096) == 6 * matrices + 3 * 32 * 4 * 4096 * 4096
    augmented = LlamaConfig(attention=AugmentedConfig(group_size=64))
    assert training_flops_per_token(augmented, 4096) == 6 * matrices + 3 * 32 * (4 * 64 * 4096 + 4 * 4096 * 128)
    gpt2 = Gpt2Config(attention=SOFTMAX)
    assert training_flops_per_token(gpt2, 1024) == 6 * (12 * 12 * 768**2 + 768 * 50257) + 3 * 12 * 4 * 1024 * 768
