"""FLASH as a whole: its size, and the invariants of a model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.attentions.base import AttentionConfig
from lin_jax.attentions.registry import with_kind
from lin_jax.experiment import AugmentedConfig, FlashConfig
from lin_jax.models.flash import Flash

pytestmark = pytest.mark.usefixtures("quick_compilation")

V, G = 61, 4
SMALL = {
    "vocabulary_size": V,
    "width": 16,
    "depth": 2,
    "query_key_size": 8,
    "rotary_size": 4,
    "bias_buckets": 8,
    "bias_max_distance": 20,
    "score_scale": "head",
}


def attention_of(kind: str = "augmented", **changes) -> AttentionConfig:
    return with_kind(AugmentedConfig(group_size=G, convolution=5, feature_size=12), kind, **changes)


def config(attention: dict | None = None, **changes) -> FlashConfig:
    return FlashConfig(**{**SMALL, "attention": attention_of(**(attention or {})), **changes})


# Together they hold every option of a causal model at least once.
CAUSAL = {
    "released": config(),
    "laplace": config({"local": "laplace", "local_groups": 2, "feature_map": "favor"}, norm="layernorm"),
    "softmax_local": config({"local": "softmax", "castling": True, "feature_map": "fourier", "convolution": 9}),
    "grouped": config({"local": "none", "convolution": 0, "feature_map": "elu1"}, token_shift=False),
    "local": config({"grouped": False, "local_groups": 2, "castling": True}, rotary_size=0),
    "convolution": config({"local": "none", "grouped": False, "convolution": 13}),
    "unit": config({"local": "laplace", "feature_map": "unit", "convolution": 1}),
    "relu": config({"feature_map": "relu", "group_size": 32}),
    "softmax": config({"kind": "softmax"}),
    "quadratic": config({"kind": "quadratic", "local": "laplace"}, norm="layernorm"),
}
BIDIRECTIONAL = {
    "bidirectional": config({"causal": False}),
    "bidirectional_laplace": config({"causal": False, "local": "laplace", "local_groups": 2, "castling": True}),
    "bidirectional_favor": config({"causal": False, "local": "softmax", "feature_map": "favor"}, norm="layernorm"),
    "bidirectional_softmax": config({"causal": False, "kind": "softmax"}, token_shift=False),
    "bidirectional_quadratic": config({"causal": False, "kind": "quadratic"}),
}
ALL = {**CAUSAL, **BIDIRECTIONAL}


def make(model_config: FlashConfig) -> Flash:
    """A model whose attention matters: its first queries and keys are too small to be seen through rounding."""
    model = Flash(model_config, rngs=nnx.Rngs(0))
    model.layers.gamma[...] = 50 * model.layers.gamma[...]
    return model


def run(model: Flash, *arguments: jax.Array | None) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, *arguments: nnx.merge(graph, state)(*arguments))(state, *arguments))


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, shape)


@pytest.mark.parametrize("name", ALL)
def test_padding_and_packing_change_nothing(name):
    """Invariant 4: left-padded, right-padded and packed rows give the unpadded logits."""
    T, total = 14, 25
    model, document = make(ALL[name]), tokens(T)
    expected = run(model, jnp.asarray(document[None]))[0]
    rows, ids, starts = tokens(4, total, seed=1), np.zeros((4, total), np.int32), (11, 0, 6, 6)
    ids[2, :6], ids[2, 20:], ids[3, :6], ids[3, 20:] = 3, 2, 0, 4
    for row, start in enumerate(starts):
        rows[row, start : start + T], ids[row, start : start + T] = document, 1
    logits = run(model, jnp.asarray(rows), jnp.asarray(ids))
    for row, start in enumerate(starts):
        np.testing.assert_allclose(logits[row, start : start + T], expected, atol=2e-5)
    assert np.abs(expected).max() > 0.1


def influence(model: Flash, row: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    """[T, T]: the largest derivative of token t's logits, weighted, with respect to token s's embedding.

    All tokens of the row are different, so an entry of the embedding table is one token's.
    """
    graph, table, rest = nnx.split(model, nnx.PathContains("embedding"), ...)
    weight = jnp.asarray(np.random.default_rng(2).standard_normal(V), jnp.float32)

    @jax.jit
    def jacobian(table, rest, row, ids):
        return jax.jacrev(lambda table: nnx.merge(graph, table, rest)(row[None], ids)[0] @ weight)(table)

    found = jacobian(table, rest, jnp.asarray(row), None if ids is None else jnp.asarray(ids[None]))
    return np.abs(np.asarray(jax.tree.leaves(found)[0])[:, row]).max(axis=-1)


@pytest.mark.parametrize("name", ["released", "laplace", "softmax_local", "softmax", "quadratic"])
@pytest.mark.parametrize("segments", [False, True])
def test_no_token_sees_a_later_one_or_another_document(name, segments):
    """Invariant 1: the derivative is exactly 0, and is not where a token may be seen."""
    T = 14
    row = np.random.default_rng(3).permutation(V)[:T]
    ids = np.array([1] * 5 + [2] * 6 + [0] * 3) if segments else None
    found = influence(make(CAUSAL[name]), row, ids)
    same = np.ones((T, T), bool) if ids is None else (ids[:, None] == ids) & (ids > 0)[:, None]
    seen = same & np.tril(np.ones((T, T), bool))
    real = np.ones(T, bool) if ids is None else ids > 0
    assert np.all(found[real][~seen[real]] == 0)
    assert np.all(np.diag(found) > 0)
    # Of the tokens before: all, but for those whose scores relu2 sets to 0.
    assert np.mean(found[seen] > 0) > 0.9


@pytest.mark.parametrize("name", ["bidirectional", "bidirectional_softmax"])
def test_a_bidirectional_token_sees_its_whole_document_and_no_other(name):
    ids = np.array([1] * 5 + [2] * 9)
    found = influence(make(BIDIRECTIONAL[name]), np.random.default_rng(3).permutation(V)[:14], ids)
    same = ids[:, None] == ids
    assert np.all(found[~same] == 0)
    assert np.mean(found[same] > 0) > 0.9


def value_and_gradient(model: Flash, *arguments: jax.Array):
    """The sum of sines of the logits, and its gradient."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def total(parameters):
        return jnp.mean(jnp.sin(nnx.merge(graph, parameters, rest)(*arguments)))

    return jax.jit(jax.value_and_grad(total))(parameters)


def assert_close(actual, expected, tolerance):
    """Every array to `tolerance` of its own largest entry."""

    def check(a, b):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= tolerance * max(float(np.abs(b).max()), 1e-6)

    jax.tree.map(check, actual, expected)


@pytest.mark.parametrize("name", ["released", "softmax_local", "bidirectional_laplace"])
def test_reference_and_xla_are_one_model(name):
    attention = dataclasses.replace(ALL[name].attention, implementation="reference")
    reference = make(dataclasses.replace(ALL[name], attention=attention))
    arguments = jnp.asarray(tokens(2, 11)), jnp.asarray([[1] * 11, [0] * 3 + [2] * 8])
    assert_close(value_and_gradient(make(ALL[name]), *arguments), value_and_gradient(reference, *arguments), 1e-4)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_number(remat):
    arguments = (jnp.asarray(tokens(2, 11)),)
    expected = value_and_gradient(make(CAUSAL["released"]), *arguments)
    actual = value_and_gradient(make(dataclasses.replace(CAUSAL["released"], remat=remat)), *arguments)
    assert_close(actual, expected, 1e-5)


def program_size(depth: int, remat: str) -> int:
    """Characters of a training step's program before compilation."""
    model = nnx.eval_shape(lambda: Flash(config(depth=depth, remat=remat), rngs=nnx.Rngs(0)))
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss(parameters, rest, tokens_BT):
        return jnp.mean(nnx.merge(graph, parameters, rest)(tokens_BT))

    lowered = jax.jit(jax.grad(loss)).lower(parameters, rest, jax.ShapeDtypeStruct((2, 32), jnp.int32))
    return len(lowered.as_text())


@pytest.mark.parametrize("remat", ["none", "full"])
def test_depth_is_compiled_once(remat):
    assert program_size(24, remat) < 1.02 * program_size(2, remat)


def test_bfloat16_is_close_to_float32():
    narrow = make(dataclasses.replace(CAUSAL["released"], dtype="bfloat16"))
    arguments = (jnp.asarray(tokens(2, 30)),)
    expected = run(make(CAUSAL["released"]), *arguments)
    actual = run(narrow, *arguments)
    assert actual.dtype == np.float32
    # Eight bits of mantissa, a few roundings a layer; and rounding did happen.
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 5e-2


@pytest.mark.parametrize("name", ["released", "softmax"])
def test_released_scale_depends_on_the_row(name):
    """Only whole-row attention divides by the row length as released."""
    model = make(dataclasses.replace(ALL[name], score_scale="released"))
    row = tokens(1, 12)
    short, long = run(model, jnp.asarray(row[:, :8])), run(model, jnp.asarray(row))[:, :8]
    assert (np.abs(short - long).max() < 1e-5) == (name == "released")


def count(model_config: FlashConfig) -> int:
    """Trainable parameters, without making one."""
    model = nnx.eval_shape(lambda: Flash(model_config, rngs=nnx.Rngs(0)))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_parameters_of_the_released_110m():
    """As the official code counts: 164,661,098 without a filter, and 24 filters of 63 taps of which it uses 32."""
    without = FlashConfig(attention=AugmentedConfig(convolution=0))
    assert count(without) == 164_661_098
    assert count(FlashConfig()) == 164_662_610 - 24 * 31


def test_random_projections_are_not_trained():
    assert count(CAUSAL["laplace"]) == count(
        dataclasses.replace(
            CAUSAL["laplace"], attention=dataclasses.replace(CAUSAL["laplace"].attention, feature_map="identity")
        )
    )
