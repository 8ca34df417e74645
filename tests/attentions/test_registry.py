"""Kinds by name: presets, other kinds with the same settings, layers that keep softmax attention."""

import dataclasses

import pytest
from flax import nnx

from lin_jax.attentions.augmented import AugmentedConfig
from lin_jax.attentions.base import HeadSizes
from lin_jax.attentions.longlora import LongloraConfig
from lin_jax.attentions.quadratic import QuadraticConfig
from lin_jax.attentions.registry import (
    ATTENTIONS,
    attention_of_kind,
    check_attention,
    make_attention,
    preset_names,
    with_kind,
)
from lin_jax.attentions.softmax import SoftmaxAttention, SoftmaxConfig
from lin_jax.settings.base import ConfigError


def test_a_name_makes_the_kind_that_its_settings_name():
    for kind in ATTENTIONS:
        config = ATTENTIONS[kind].settings()
        module = make_attention(config, HeadSizes(2, 2, 4, 4), nnx.Rngs(0))
        assert config.kind == kind and type(module) is ATTENTIONS[kind]


def test_presets_are_points_of_their_kind():
    assert preset_names()["local_grouped"] == "augmented" and preset_names()["softmax"] == "softmax"
    for name, kind in preset_names().items():
        ATTENTIONS[kind].settings(**ATTENTIONS[kind].presets[name])


def test_another_kind_keeps_what_both_have():
    start = AugmentedConfig(causal=False, local="laplace", softmax_layers=(1,), group_size=7)
    assert with_kind(start, "quadratic") == QuadraticConfig(causal=False, local="laplace")
    assert with_kind(start, "longlora", split=3) == LongloraConfig(causal=False, softmax_layers=(1,), split=3)
    assert with_kind(start, "softmax") == SoftmaxConfig(causal=False)
    assert with_kind(start, "augmented", group_size=8) == dataclasses.replace(start, group_size=8)


def test_layers_of_two_kinds():
    config = AugmentedConfig(softmax_layers=(0, 2))
    assert config.kinds(4) == ["softmax", "augmented", "softmax", "augmented"]
    module = make_attention(config, HeadSizes(2, 2, 4, 4), nnx.Rngs(0))
    assert attention_of_kind(module, "augmented") is module
    assert isinstance(attention_of_kind(module, "softmax"), SoftmaxAttention)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuadraticConfig(), "kind=quadratic is FLASH's"),
        (AugmentedConfig(causal=False), "causal=false is not for models that predict the next token"),
        (AugmentedConfig(softmax_layers=(2,)), "names a layer that depth=2 does not have"),
        (AugmentedConfig(feature_map="favor"), "feature_map=favor is FLASH's"),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_what_transformers_do_not_have(config, message):
    with pytest.raises(ConfigError, match=message):
        check_attention(config, 2, "llama")
