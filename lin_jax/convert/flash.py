"""The official FLASHTransformer (PyTorch state dict) and our Flash."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array

from lin_jax.config import AttentionConfig, FlashConfig, Kind, Local
from lin_jax.convert.names import Entry, centred_filter, load, parameters, scalar, to_theirs, transposed
from lin_jax.models.flash import Flash

# Computed from the config, in the official code as in ours.
IGNORED = ("inv_freq", "rotary_pos_emb.freqs")


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
    if config.attention.kind == "augmented" and config.attention.convolution:
        table.append(centred_filter(layer + "dwconv.weight", "layers.filter", kernel // 2 + 1))
    return table


def config_from_official(official: Mapping[str, Any]) -> FlashConfig:
    """Our config of the official model's constructor arguments; padding is as released."""
    kind: Kind = "softmax" if official["softmax"] else "quadratic" if official["square"] else "augmented"
    whole_row = kind != "augmented"
    activation: Local = "laplace" if official["laplace_attn_fn"] else "relu2"
    attention = AttentionConfig(
        kind=kind,
        local=activation if whole_row or official["local_"] else "none",
        grouped=bool(official["global_"]) and not whole_row,
        convolution=official["kernel"] // 2 + 1 if official["conv"] and not whole_row else 0,
        castling=bool(official["castling"] and official["conv"] and not whole_row),
        causal=official["causal"],
        group_size=official["group_size"],
    )
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


def from_official(config: FlashConfig, theirs: Mapping[str, np.ndarray], kernel: int = 63) -> Flash:
    """A Flash with the parameters of an official state dict.

    Raises:
        ConfigError: names or shapes that do not fit `config`.
    """
    model = nnx.eval_shape(lambda: Flash(config, rngs=nnx.Rngs(0)))
    has_filter = config.attention.kind == "augmented" and config.attention.convolution
    # The official code makes the filter also where it never uses it.
    ignored = IGNORED if has_filter else (*IGNORED, "dwconv.weight")
    load(model, name_table(config, kernel), theirs, config.depth, ignored)
    return model


def to_official(model: Flash, kernel: int = 63, arrays: Mapping[str, Array] | None = None) -> dict[str, np.ndarray]:
    """The parameters of `model`, or `arrays` of the same paths (gradients, say), under the official names."""
    ours = parameters(model) if arrays is None else arrays
    return to_theirs(name_table(model.config, kernel), ours, model.config.depth)
