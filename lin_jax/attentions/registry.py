"""The kinds of attention by name."""

import dataclasses
from typing import Any

from flax import nnx

from lin_jax.attentions.base import Attention, AttentionConfig, HeadSizes
from lin_jax.settings.base import require
from lin_jax.settings.registry import Registry

ATTENTIONS: Registry[type[Attention]] = Registry(
    "attention",
    "kind",
    {
        "augmented": "lin_jax.attentions.augmented:AugmentedAttention",
        "softmax": "lin_jax.attentions.softmax:SoftmaxAttention",
        "longlora": "lin_jax.attentions.longlora:LongloraAttention",
        "quadratic": "lin_jax.attentions.quadratic:QuadraticAttention",
    },
)


def make_attention(config: AttentionConfig, sizes: HeadSizes, rngs: nnx.Rngs, *, of_memory: bool = False) -> Attention:
    """Return a new module of the kind that `config` names, see `Attention`."""
    # Kinds that have no memory need not know that there are others.
    options = {"of_memory": True} if of_memory else {}
    return ATTENTIONS[config.kind](config, sizes, rngs=rngs, **options)


def attention_of_kind(attention: Attention, kind: str) -> Attention:
    """Return the attention of a layer: the model's, or the softmax attention that some of its layers keep."""
    if attention.config.kind == kind:
        return attention
    softmax = ATTENTIONS[kind]
    # It has no parameters, and so no sizes and no random numbers.
    return softmax(softmax.settings(kind=kind, causal=attention.config.causal), HeadSizes(0, 0, 0, 0), rngs=nnx.Rngs(0))


def preset_attention(attention: AttentionConfig, name: str) -> AttentionConfig:
    """Return the settings that a preset names, such as a row of the paper's ablation tables.

    Args:
        attention: whose other settings are kept, as far as the preset's kind has them.
        name: of a preset of any kind.

    Raises:
        ConfigError: there is no such preset.
    """
    named = preset_names()
    require(name in named, f"unknown ablation {name!r}; there are {', '.join(named)}")
    entry = ATTENTIONS[named[name]]
    return with_kind(attention, named[name], **entry.presets[name])


def preset_names() -> dict[str, str]:
    """Return the names of all presets, each with its kind."""
    return {preset: kind for kind in ATTENTIONS for preset in ATTENTIONS[kind].presets}


def with_kind(attention: AttentionConfig, kind: str, **changes: Any) -> AttentionConfig:
    """Return settings of another kind, with the values of fields that both kinds have, and with `changes`."""
    settings = ATTENTIONS[kind].settings
    shared = {field.name for field in dataclasses.fields(settings)} - {"kind"}
    own = {field.name for field in dataclasses.fields(attention)}
    return settings(**{**{name: getattr(attention, name) for name in own & shared}, "kind": kind, **changes})


def check_transformer_attention(attention: AttentionConfig, depth: int) -> None:
    """Raise `ConfigError` for an attention that a causal model of separate projections does not have."""
    require(attention.causal, "attention.causal=false is not for models that predict the next token")
    refusal = ATTENTIONS[attention.kind].refusal(attention)
    require(refusal is None, str(refusal))
    softmax_layers = getattr(attention, "softmax_layers", ())
    require(
        all(layer < depth for layer in softmax_layers),
        f"attention.softmax_layers={softmax_layers} names a layer that depth={depth} does not have",
    )
