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
        "released_t5": "lin_jax.attentions.released_t5:ReleasedT5Attention",
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


def check_attention(
    attention: AttentionConfig,
    depth: int,
    architecture: str,
    *,
    name: str = "attention",
    causal: bool = True,
    bias: bool = False,
    memory: bool = False,
) -> None:
    """Raise `ConfigError` for an attention that a model of separate projections does not have.

    Args:
        attention: its settings.
        depth: layers that have it.
        architecture: name of the model.
        name: of the field in the model's settings.
        causal: whether the model's tokens see earlier ones alone.
        bias: whether its scores have a bias by distance.
        memory: whether its keys and values are those of another sequence.
    """
    kind, told = ATTENTIONS[attention.kind], f"{name}.kind={attention.kind}"
    if causal:
        require(attention.causal, f"{name}.causal=false is not for models that predict the next token")
    else:
        require(not attention.causal, f"{name}.causal=true is not for {architecture}, where tokens see later ones too")
        require(kind.bidirectional, f"{told} sees earlier tokens alone, and is not for {architecture}'s {name}")
    require(kind.takes_bias or not bias, f"{told} takes no bias of positions, and is not for {architecture}'s {name}")
    require(kind.takes_memory or not memory, f"{told} has no form for the tokens of another sequence")
    refusal = kind.refusal(attention, architecture)
    require(refusal is None, f"{name}.{refusal}")
    softmax_layers = getattr(attention, "softmax_layers", ())
    require(
        all(layer < depth for layer in softmax_layers),
        f"{name}.softmax_layers={softmax_layers} names a layer that depth={depth} does not have",
    )
