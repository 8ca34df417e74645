"""Augmented attention in a layer: where its parameters start, and that weights in between change nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.attentions.augmented import AugmentedAttention, AugmentedConfig
from lin_jax.attentions.base import HeadSizes, Scoring
from lin_jax.attentions.registry import preset_attention
from lin_jax.layers.rows import place
from lin_jax.ops.linear_attention.feature_maps import unit
from lin_jax.settings.base import ConfigError
from tests.models.transformers import AUGMENTED, make_config, make_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = HeadSizes(4, 2, 8, 8)
T, G = 11, 4


def heads(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    counts = (SIZES.heads, SIZES.key_value_heads, SIZES.key_value_heads)
    return [jax.random.normal(key, (1, T, count, 8)) for key, count in zip(keys, counts, strict=True)]


def attention(**changes):
    """A module whose parameters are far from their start."""
    module = AugmentedAttention(AugmentedConfig(group_size=G, convolution=3, **changes), SIZES, rngs=nnx.Rngs(0))
    state, keys = nnx.state(module, nnx.Param), iter(jax.random.split(jax.random.key(9), 3))
    nnx.update(module, jax.tree.map(lambda x: x + 0.5 * jax.random.normal(next(keys), x.shape), state))
    return module


def by_the_formula(module, q, k, v):
    """Every branch token by token: relu2 scores of unit vectors, the groups before, the convolution."""
    config, y = module.config, np.zeros((T, SIZES.heads, 8))
    q, k = np.asarray(unit(q))[0], np.asarray(unit(k))[0]
    v, taps = np.asarray(v)[0], np.asarray(module.filter[...])
    weight = float(module.local_factor[...]) if config.local_weight == "learned" else 1.0
    alpha = float(module.alpha[...]) if config.grouped_weight == "learned" else 1.0
    for t in range(T):
        for h in range(SIZES.heads):
            shared = h // 2
            local, grouped = np.zeros(8), np.zeros(8)
            for s in range(t + 1):
                score = q[t, h] @ k[s, shared]
                if t // G == s // G:
                    local += max(score, 0) ** 2 * v[s, shared]
                else:
                    grouped += score * v[s, shared]
            if config.normalise_grouped:
                grouped = grouped / (1e-5 + np.linalg.norm(grouped))
            y[t, h] = weight * local + alpha * grouped
            y[t, h] += sum(taps[j, h] * v[t - j, shared] for j in range(min(3, t + 1)))
    return y


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"local_weight": "learned"},
        {"normalise_grouped": True},
        {"grouped_weight": "one", "local_weight": "learned", "normalise_grouped": True},
    ],
    ids=str,
)
def test_it_is_the_sum_of_its_branches(changes):
    module, (q, k, v) = attention(**changes), heads()
    found = module(q, k, v, place(None, (1, T)))
    np.testing.assert_allclose(found[0], by_the_formula(module, q, k, v), atol=2e-5)


def test_new_parameters_start_so_that_nothing_changes():
    module, (q, k, v) = AugmentedAttention(AugmentedConfig(group_size=G), SIZES, rngs=nnx.Rngs(0)), heads()
    local = AugmentedAttention(preset_attention(module.config, "local"), SIZES, rngs=nnx.Rngs(0))
    rows = place(None, (1, T))
    np.testing.assert_allclose(module(q, k, v, rows), local(q, k, v, rows), atol=1e-6)
    assert all("new" in parameter.roles for _, parameter in nnx.to_flat_state(nnx.state(module, nnx.Param)))
    mixing = make_model(make_config("llama", AUGMENTED)).layers.attention.mixing
    assert mixing.alpha.shape == (3,) and mixing.filter.shape == (3, 3, 4)


def test_a_models_own_scale_and_bias_replace_the_kinds():
    module, (q, k, v) = attention(local="softmax", grouped=False), heads()
    rows, bias_XH = place(None, (1, T)), jax.random.normal(jax.random.key(5), (G, 1))
    plain = module(q, k, v, rows)
    same = module(q, k, v, rows, scoring=Scoring(8**-0.5, jnp.full((G, 1), 3.0)))
    # A bias that is the same at all distances falls out of the softmax.
    np.testing.assert_allclose(same, plain, atol=1e-5)
    assert np.abs(np.asarray(module(q, k, v, rows, scoring=Scoring(8**-0.5, bias_XH)) - plain)).max() > 1e-2


@pytest.mark.parametrize("local", ["relu2", "softmax", "none"])
def test_both_directions_with_a_centred_convolution(local):
    module, (q, k, v) = attention(local=local, causal=False), heads()
    ids = np.array([[1] * 9 + [0] * 2])
    found = np.asarray(module(q, k, v, place(jnp.asarray(ids), (1, T))))[0]
    assert module.filter.shape == (5, SIZES.heads)
    unit_q, unit_k = np.asarray(unit(q))[0], np.asarray(unit(k))[0]
    plain_q, plain_k, v, taps = np.asarray(q)[0], np.asarray(k)[0], np.asarray(v)[0], np.asarray(module.filter[...])
    for t, h in np.ndindex(9, SIZES.heads):
        near, shared, y = [s for s in range(9) if s // G == t // G], h // 2, np.zeros(8)
        if local == "softmax":
            weights = np.exp([plain_q[t, h] @ plain_k[s, shared] / 8**0.5 for s in near])
            y += weights / weights.sum() @ v[near, shared]
        elif local == "relu2":
            y += sum(max(unit_q[t, h] @ unit_k[s, shared], 0) ** 2 * v[s, shared] for s in near)
        y += float(module.alpha[...]) * sum(unit_q[t, h] @ unit_k[s, shared] * v[s, shared] for s in range(9))
        y += sum(taps[j, h] * v[t - j + 2, shared] for j in range(5) if 0 <= t - j + 2 < 9)
        np.testing.assert_allclose(found[t, h], y, atol=2e-5)


@pytest.mark.parametrize("S", [1, T, 30])
@pytest.mark.parametrize("feature_map", ["identity", "elu1"])
def test_another_sequence_of_another_length(S, feature_map):
    config = AugmentedConfig(causal=False, feature_map=feature_map)
    module = AugmentedAttention(config, SIZES, rngs=nnx.Rngs(0), of_memory=True)
    assert float(module.alpha[...]) == 1 and not hasattr(module, "filter")
    module.alpha.set_value(jnp.float32(0.7))
    q, (k, v) = heads()[0], (jax.random.normal(jax.random.key(seed), (1, S, 2, 8)) for seed in (5, 6))
    real = np.arange(S) % 4 != 1
    # What padding holds must not matter, whatever it is.
    v = jnp.where(jnp.asarray(real)[None, :, None, None], v, jnp.nan)
    memory = place(jnp.asarray(real, jnp.int32)[None], (1, S))
    found = module(q, k, v, place(None, (1, T)), memory=memory)
    phi = {"identity": lambda x: x, "elu1": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))}[feature_map]
    unit_q, unit_k = phi(np.asarray(unit(q))[0]), phi(np.asarray(unit(k))[0])
    for t, h in np.ndindex(T, SIZES.heads):
        weights = (unit_q[t, h] @ unit_k[real, h // 2].T)[:, None]
        expected = 0.7 * (weights * np.asarray(v)[0, real, h // 2]).mean(axis=0)
        np.testing.assert_allclose(found[0, t, h], expected, atol=1e-5)
    once = module.attend_memory(q, module.memory_state(k, v, memory))
    np.testing.assert_allclose(once, found, atol=1e-6)


def test_what_it_cannot_do_is_told_in_a_line():
    module = attention()
    with pytest.raises(ConfigError, match="attention to another sequence has the grouped branch alone"):
        AugmentedAttention(AugmentedConfig(grouped=False), SIZES, rngs=nnx.Rngs(0), of_memory=True)
    with pytest.raises(ConfigError, match="feature_map must be one of identity, .* but is square"):
        AugmentedConfig(feature_map="square")
    random = dataclasses.replace(module.config, feature_map="favor")
    assert "feature_map=favor is FLASH's" in str(AugmentedAttention.refusal(random, "llama"))
    with pytest.raises(ConfigError, match=r"parts, which is no multiple of model\.attention\.group_size=4"):
        AugmentedAttention.check_parts(module.config, 6, "parts")
    with pytest.raises(ConfigError, match="parts, fewer than the 11 that"):
        AugmentedAttention.check_parts(AugmentedConfig(group_size=4, local_groups=3, convolution=3), 8, "parts")
