"""LLaMA, and GPT-2 beside it, with every kind of attention: no leaks, no trace of padding, hybrids."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.layers.rope import rotation
from lin_jax.layers.rows import place
from tests.models.transformers import ATTENTION, AUGMENTED, LENGTH, SEGMENTS, T, make_config, make_model

pytestmark = pytest.mark.usefixtures("quick_compilation")


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


def test_bfloat16_activations():
    model = make_model(dataclasses.replace(make_config("llama", AUGMENTED), dtype="bfloat16"))
    features = model.features(jnp.arange(T)[None])
    assert features.dtype == jnp.bfloat16 and model.head(features).dtype == jnp.float32
