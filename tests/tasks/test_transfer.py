"""Attention transfer against a loop over the layers, and what it teaches whom."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.experiment import (
    AugmentedConfig,
    Config,
    DataConfig,
    Gpt2Config,
    LlamaConfig,
    MeshConfig,
    SoftmaxConfig,
    TransferFinetuneConfig,
)
from lin_jax.models.registry import create_model
from lin_jax.models.structure import make_structure
from lin_jax.tasks.transfer import AttentionTransfer, attention_errors
from lin_jax.train.sharding import make_partition

pytestmark = pytest.mark.usefixtures("quick_compilation")

ATTENTION = AugmentedConfig(local="softmax", group_size=4, convolution=3, softmax_layers=(1,))
CONFIGS = [
    LlamaConfig(
        vocabulary_size=50,
        width=32,
        depth=3,
        heads=4,
        key_value_heads=2,
        head_size=8,
        feed_forward_size=48,
        attention=ATTENTION,
        remat="full",
    ),
    Gpt2Config(vocabulary_size=50, width=32, depth=3, heads=4, feed_forward_size=48, positions=64, attention=ATTENTION),
]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 18)), jnp.int32)
SEGMENTS = jnp.array([[1] * 7 + [2] * 11, [1] * 18], jnp.int32)


def with_noise(model, seed):
    """The model with other attention parameters."""
    keys = nnx.Rngs(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if {"attention", "mixing", "query_key_value", "output"} & set(map(str, path)):
            value = variable.get_value()
            variable.set_value(value + 0.05 * jax.random.normal(keys.params(), value.shape))
    return model


def layer_of(layers, number):
    graph, arrays = nnx.split(layers)
    return nnx.merge(graph, jax.tree.map(lambda array: array[number], arrays))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.architecture)
def test_it_is_the_error_of_each_layer_on_the_teachers_features(config):
    teacher = create_model(config, nnx.Rngs(0))
    student = with_noise(create_model(config, nnx.Rngs(0)), 1)
    x, *shared = teacher.begin(TOKENS, SEGMENTS)
    errors = []
    for number, kind in enumerate(config.attention.kinds(config.depth)):
        theirs, ours = layer_of(teacher.layers, number), layer_of(student.layers, number)
        target = theirs.of_kind("softmax").attend(x, *shared)
        if kind == "augmented":
            errors.append(np.square(ours.of_kind(kind).attend(x, *shared) - target).mean(axis=-1))
        x = theirs.feed(x + target)
    found = attention_errors(student, teacher, TOKENS, SEGMENTS)
    assert len(errors) == 2 and float(np.mean(found)) > 1e-3
    np.testing.assert_allclose(found, np.mean(errors, axis=0), rtol=1e-4, atol=1e-7)


def test_the_teacher_goes_on_as_the_softmax_model():
    """The features that it hands on are those of the model with softmax attention, whatever the student does."""
    config = CONFIGS[0]
    plain = dataclasses.replace(config, attention=SoftmaxConfig())
    teacher, softmax = create_model(config, nnx.Rngs(0)), create_model(plain, nnx.Rngs(0))
    wide = dataclasses.replace(config, attention=dataclasses.replace(ATTENTION, group_size=32, softmax_layers=()))
    window = create_model(wide, nnx.Rngs(0))
    # A local softmax over all of the row, with alpha and the filter at 0, is the teacher's attention.
    np.testing.assert_allclose(attention_errors(window, teacher, TOKENS, None), 0, atol=1e-10)
    np.testing.assert_allclose(window(TOKENS), softmax(TOKENS), atol=1e-5)


def test_only_trained_attention_gets_a_gradient_and_the_start_stays():
    config = CONFIGS[0]
    structure = make_structure(
        lambda rngs: create_model(config, rngs),
        lambda path, roles: "new" in roles or "query" in path,
        keeps_start=True,
    )
    parameters, constants = structure.initialise(jnp.uint32(0))
    trained, frozen = structure.split(parameters)
    assert set(trained["layers"]["attention"]) == {"mixing", "query"}
    assert jax.tree.structure(frozen) == jax.tree.structure(parameters)
    settings = Config(
        model=config,
        data=DataConfig(packing="segments"),
        finetune=TransferFinetuneConfig(checkpoint="x", train=("attention",)),
    )
    loss = AttentionTransfer(settings).loss(structure, make_partition(MeshConfig(), jax.devices()[:1]))
    weights = np.random.default_rng(1).random(TOKENS.shape).astype(np.float32)
    batch = {"tokens": TOKENS, "segment_ids": SEGMENTS, "targets": TOKENS, "weights": weights}
    gradient = jax.grad(lambda trained: loss(trained, frozen, constants, batch, None).loss)(trained)
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(gradient))
    mixing = gradient["layers"]["attention"]["mixing"]
    np.testing.assert_array_equal(mixing["filter"][1], 0)  # the layer that keeps softmax attention
    direction = jax.tree.map(lambda leaf: leaf / optax_norm(gradient), gradient)
    step = 1e-2
    moved = [
        float(
            loss(
                jax.tree.map(lambda p, d, s=sign: p + s * step * d, trained, direction), frozen, constants, batch, None
            ).loss
        )
        for sign in (1, -1)
    ]
    np.testing.assert_allclose((moved[0] - moved[1]) / (2 * step), optax_norm(gradient), rtol=2e-2)


def optax_norm(tree):
    return float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))))
