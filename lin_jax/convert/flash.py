"""The official FLASHTransformer (PyTorch state dict) and our Flash."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np
from flax import nnx
from jaxtyping import Array

from lin_jax.attentions.augmented import AugmentedConfig
from lin_jax.attentions.base import AttentionConfig
from lin_jax.attentions.quadratic import QuadraticConfig
from lin_jax.attentions.softmax import SoftmaxConfig
from lin_jax.convert.names import Entry, centred_filter, load, scalar, to_theirs, transposed
from lin_jax.convert.tensors import Renamed, Tensors
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.models.flash import Flash, FlashConfig
from lin_jax.settings.base import ConfigError, require

# Computed from the config, in the official code as in ours.
IGNORED = ("inv_freq", "rotary_pos_emb.freqs")
_FILTER = "layers.0.dwconv.weight"


def name_table(config: FlashConfig, kernel: int) -> list[Entry]:
    """One entry a parameter. `kernel` is the official filter's taps, of which the first kernel // 2 + 1 are used."""
    layer = "layers.{layer}."
    table = [
        Entry("token_emb.weight", "embedding"),
        scalar("abs_pos_emb.scale", "position_scale"),
        Entry(layer + "rel_pos_bias.relative_attention_bias.weight", "layers.bias"),
        transposed(layer + "to_hidden.0.weight", "layers.hidden.kernel"),
        Entry(layer + "to_hidden.0.bias", "layers.hidden.bias"),
        transposed(layer + "to_qk.0.weight", "layers.query_key.kernel"),
        Entry(layer + "to_qk.0.bias", "layers.query_key.bias"),
        Entry(layer + "qk_offset_scale.gamma", "layers.gamma"),
        Entry(layer + "qk_offset_scale.beta", "layers.beta"),
        transposed(layer + "to_out.weight", "layers.output.kernel"),
        Entry(layer + "to_out.bias", "layers.output.bias"),
        Entry("to_logits.0.weight", "norm.weight"),
        Entry("to_logits.0.bias", "norm.bias"),
        transposed("to_logits.1.weight", "logits.kernel"),
        Entry("to_logits.1.bias", "logits.bias"),
    ]
    if config.norm == "scalenorm":
        table.append(scalar(layer + "norm.g", "layers.norm.scale"))
    else:
        table.append(Entry(layer + "norm.weight", "layers.norm.weight"))
        table.append(Entry(layer + "norm.bias", "layers.norm.bias"))
    if isinstance(config.attention, AugmentedConfig) and config.attention.convolution:
        table.append(centred_filter(layer + "dwconv.weight", "layers.filter", kernel // 2 + 1))
    return table


def config_from_official(official: Mapping[str, Any]) -> FlashConfig:
    """Return our config of the official model's constructor arguments; padding is as released.

    Raises:
        ConfigError: arguments that ours has no settings for.
    """
    attention = _attention_from_official(official)
    return FlashConfig(
        vocabulary_size=official["num_tokens"],
        width=official["dim"],
        depth=official["depth"],
        query_key_size=official["query_key_dim"],
        expansion=official["expansion_factor"],
        norm=official["norm_type"],
        token_shift=official["shift_tokens"],
        rotary_size=min(official["rotary_dim"], official["query_key_dim"]),
        attention=attention,
        padding="released",
    )


def _attention_from_official(official: Mapping[str, Any]) -> AttentionConfig:
    own_groups = official["global_"] and not official["causal"] and not official["reduce_group_non_causal_attn"]
    whole = official["softmax"] or official["square"]
    require(
        whole or not own_groups,
        "reduce_group_non_causal_attn=False is not supported: bidirectional grouped attention sums over all groups",
    )
    activation: Literal["laplace", "relu2"] = "laplace" if official["laplace_attn_fn"] else "relu2"
    if official["softmax"]:
        return SoftmaxConfig(causal=official["causal"])
    if official["square"]:
        return QuadraticConfig(local=activation, causal=official["causal"])
    return AugmentedConfig(
        local=activation if official["local_"] else "none",
        grouped=bool(official["global_"]),
        convolution=official["kernel"] // 2 + 1 if official["conv"] else 0,
        castling=bool(official["castling"] and official["conv"]),
        causal=official["causal"],
        group_size=official["group_size"],
    )


def is_official(names: Collection[str]) -> bool:
    """Whether these are names of an official state dict, maybe with those of modules around it before them."""
    return _prefix(names) is not None


def without_prefix(tensors: Tensors) -> Tensors:
    """`tensors` under the names of the model itself, without those of the modules that were around it."""
    start = _prefix(tensors) or ""
    return Renamed(tensors, {name.removeprefix(start): name for name in tensors})


def _prefix(names: Collection[str]) -> str | None:
    marks = ("token_emb.weight", "layers.0.to_hidden.0.weight", "layers.0.to_qk.0.weight")
    starts = [name.removesuffix(marks[0]) for name in names if name.endswith(marks[0])]
    return next((start for start in starts if all(start + mark in names for mark in marks)), None)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> FlashConfig:
    """What the shapes of an official state dict tell, and for the rest the official training script's settings.

    They don't tell the activation, the group, causality, Castling, the token shift, nor which branches were on.

    Raises:
        ConfigError: shapes that are no such model's.
    """
    layer = "layers.0."
    try:
        (vocabulary, width), (key_size, _) = shapes["token_emb.weight"], shapes[layer + "to_qk.0.weight"]
        buckets, _ = shapes[layer + "rel_pos_bias.relative_attention_bias.weight"]
        hidden = shapes[layer + "to_hidden.0.weight"][0]
    except (KeyError, ValueError) as error:
        raise ConfigError(f"this is no FLASHTransformer as the official code makes it: {error}") from error
    frequencies = shapes.get(layer + "rotary_pos_emb.freqs", (16,))
    return FlashConfig(
        vocabulary_size=vocabulary,
        width=width,
        depth=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers.")),
        query_key_size=key_size,
        expansion=hidden / 2 / width,
        norm="scalenorm" if layer + "norm.g" in shapes else "layernorm",
        rotary_size=min(2 * frequencies[0], key_size),
        bias_buckets=buckets,
        attention=AugmentedConfig(local="laplace", convolution=kernel_of(shapes) // 2 + 1 if _FILTER in shapes else 0),
        padding="released",
    )


def kernel_of(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Taps of the official filters, of which those of the future hold nothing."""
    return shapes[_FILTER][2] if _FILTER in shapes else 63


def ignored(config: FlashConfig) -> tuple[str, ...]:
    """Ends of names that hold no parameters; the official code makes the filter also where it never uses it."""
    has_filter = isinstance(config.attention, AugmentedConfig) and config.attention.convolution
    return IGNORED if has_filter else (*IGNORED, "dwconv.weight")


def from_official(config: FlashConfig, theirs: Mapping[str, np.ndarray], kernel: int = 63) -> Flash:
    """A Flash with the parameters of an official state dict.

    Raises:
        ConfigError: names or shapes that do not fit `config`.
    """
    model = nnx.eval_shape(lambda: Flash(config, rngs=nnx.Rngs(0)))
    load(model, name_table(config, kernel), theirs, config.depth, ignored(config))
    return model


def to_official(model: Flash, kernel: int = 63, arrays: Mapping[str, Array] | None = None) -> dict[str, np.ndarray]:
    """The parameters of `model`, or `arrays` of the same paths (gradients, say), under the official names."""
    ours = parameters_by_path(model) if arrays is None else arrays
    return to_theirs(name_table(model.config, kernel), ours, model.config.depth)
