"""Hugging Face's T5, v1.0, v1.1 and FLAN, the official linearized T5, and our T5."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lin_jax.attentions.base import AttentionConfig
from lin_jax.attentions.released_t5 import ReleasedT5Config
from lin_jax.convert.conversion import Conversion, attention_entries
from lin_jax.convert.hugging_face_config import (
    attention_from,
    attention_to,
    compute_type,
    labels_from,
    labels_to,
    names_ending,
)
from lin_jax.convert.names import Entry, transposed
from lin_jax.models.t5 import T5Config
from lin_jax.settings.foreign import Fields

# The names of what may be tied, and whether it is where config.json does not say.
EMBEDDING, HEAD, IS_TIED = "shared.weight", "lm_head.weight", True
_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "output"}
_FEED_FORWARD = {
    "relu": {"wi": "up", "wo": "down"},
    "gated_gelu": {"wi_0": "gate", "wi_1": "up", "wo": "down"},
}
# Where transformers keeps a model's parts when it has a head of classes.
_INSIDE = "transformer."


def name_table(config: T5Config) -> list[Entry]:
    """One entry a parameter."""
    inside = _INSIDE if config.labels else ""
    encoder, decoder = f"{inside}encoder.", f"{inside}decoder."
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    table = [
        Entry(inside + EMBEDDING, "embedding"),
        Entry(encoder + bias, "encoder_bias"),
        Entry(encoder + "final_layer_norm.weight", "encoder_norm.weight"),
        Entry(decoder + bias, "bias"),
        Entry(decoder + "final_layer_norm.weight", "norm.weight"),
    ]
    if not config.tie_embeddings:
        table.append(transposed(HEAD, "logits.kernel"))
    if config.labels:
        for theirs, ours in (("dense", "dense"), ("out_proj", "score")):
            table.append(transposed(f"classification_head.{theirs}.weight", f"classes.{ours}.kernel"))
            table.append(Entry(f"classification_head.{theirs}.bias", f"classes.{ours}.bias"))
    stack = _stack_table(config, encoder, "encoder_layers.", "encoder_attention")
    table += [dataclasses.replace(entry, depth=config.encoder_depth) for entry in stack]
    return table + _stack_table(config, decoder, "layers.", "attention", "cross_attention")


def _stack_table(config: T5Config, theirs: str, ours: str, own: str, cross: str | None = None) -> list[Entry]:
    """Return the entries of the layers of one stack, whose names and paths begin so, with its attentions' settings."""
    block = theirs + "block.{layer}.layer."
    table = _attention_table(config, f"{block}0.SelfAttention.", f"{ours}attention.", own)
    norms = ["attention_norm", "feed_forward_norm"]
    if cross is not None:
        table += _attention_table(config, f"{block}1.EncDecAttention.", f"{ours}cross.", cross)
        norms.insert(1, "cross_norm")
    for place, norm in enumerate(norms):
        table.append(Entry(f"{block}{place}.layer_norm.weight", f"{ours}{norm}.weight"))
    last = f"{block}{len(norms) - 1}.DenseReluDense."
    for name, path in _FEED_FORWARD[config.feed_forward].items():
        table.append(transposed(f"{last}{name}.weight", f"{ours}feed_forward.{path}.kernel"))
    return table


def _attention_table(config: T5Config, theirs: str, ours: str, field: str) -> list[Entry]:
    table = [transposed(f"{theirs}{name}.weight", f"{ours}{path}.kernel") for name, path in _PROJECTIONS.items()]
    of_memory = field == "cross_attention"
    return table + attention_entries(config, "t5", theirs, f"{ours}mixing.", field=field, of_memory=of_memory)


def ignored(config: T5Config) -> tuple[str, ...]:
    """Ends of names that hold no parameters: copies of the embedding, masks and a filter that nothing reads."""
    return ("embed_tokens.weight", ".conv_mask", "EncDecAttention.dwconv.weight", _OLD_BIAS)


# Old files of T5 hold a bias of cross attention, which no code reads.
_OLD_BIAS = "EncDecAttention.relative_attention_bias.weight"


def config_from_hugging_face(fields: Fields, shapes: Mapping[str, tuple[int, ...]]) -> T5Config:
    """Our config of a config.json and the shapes of its tensors.

    Raises:
        ConfigError: something is missing, of another type, or is not supported.
    """
    kinds = {"relu": "relu", "gated-gelu": "gated_gelu"}
    kind = fields.get("feed_forward_proj", str, "relu")
    fields.require(kind in kinds, f"feed_forward_proj={kind} is not supported; there are {', '.join(kinds)}")
    depth, tied = fields.get("num_layers", int), fields.get("tie_word_embeddings", bool, IS_TIED)
    head = shapes.get("classification_head.out_proj.weight", ())
    labels = head[0] if len(head) == 2 else 0
    official = _official_attentions(shapes)
    return T5Config(
        vocabulary_size=fields.get("vocab_size", int),
        width=fields.get("d_model", int),
        depth=fields.get("num_decoder_layers", int, depth),
        encoder_depth=depth,
        heads=fields.get("num_heads", int),
        head_size=fields.get("d_kv", int),
        feed_forward_size=fields.get("d_ff", int),
        feed_forward=kinds[kind],  # type: ignore[arg-type]
        norm_epsilon=fields.get("layer_norm_epsilon", float, 1e-6),
        bias_buckets=fields.get("relative_attention_num_buckets", int, 32),
        bias_distance=fields.get("relative_attention_max_distance", int, 128),
        tie_embeddings=tied,
        # Before it had a name of its own it was what tied models do.
        scale_head=fields.get("scale_decoder_outputs", bool, tied),
        start_token=fields.get("decoder_start_token_id", int, fields.get("pad_token_id", int, 0)),
        labels=labels,
        label_names=labels_from(fields, labels),
        attention=attention_from(fields, official["attention"]),
        encoder_attention=attention_from(fields, official["encoder_attention"], "encoder_attention", causal=False),
        cross_attention=attention_from(fields, official["cross_attention"], "cross_attention", causal=False),
        dtype=compute_type(fields),
    )


def _official_attentions(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, AttentionConfig | None]:
    """What the names of an official linearized checkpoint tell of each attention: one with both parameters is its."""
    places = {
        "attention": ("decoder.", ".SelfAttention."),
        "encoder_attention": ("encoder.", ".SelfAttention."),
        "cross_attention": ("decoder.", ".EncDecAttention."),
    }
    found: dict[str, AttentionConfig | None] = dict.fromkeys(places)
    for field, (stack, part) in places.items():
        names = [name for name in shapes if stack in name and part in name]
        filters = [shapes[name] for name in names_ending(names, "dwconv.weight") if len(shapes[name]) == 4]
        if filters and names_ending(names, f"{part}alpha"):
            # Cross attention has a filter that it never uses.
            taps = 0 if field == "cross_attention" else filters[0][2] // 2 + 1
            found[field] = ReleasedT5Config(convolution=taps, causal=field == "attention")
    return found


def config_to_hugging_face(config: T5Config) -> dict[str, Any]:
    """The contents of a config.json."""
    names = T5Config.attention_fields
    return {
        "architectures": ["T5ForSequenceClassification" if config.labels else "T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocabulary_size,
        "d_model": config.width,
        "d_kv": config.head_size,
        "d_ff": config.feed_forward_size,
        "num_layers": config.encoder_depth,
        "num_decoder_layers": config.depth,
        "num_heads": config.heads,
        "feed_forward_proj": config.feed_forward.replace("_", "-"),
        "layer_norm_epsilon": config.norm_epsilon,
        "relative_attention_num_buckets": config.bias_buckets,
        "relative_attention_max_distance": config.bias_distance,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_head,
        "decoder_start_token_id": config.start_token,
        **labels_to(config),
        **attention_to(*(getattr(config, name) for name in names), names=names),
    }


def extra_tensors(config: T5Config) -> dict[str, np.ndarray]:
    """None: the official T5 code computes its masks."""
    return {}


CONVERSION = Conversion(
    model_type="t5",
    name_table=name_table,
    ignored=ignored,
    config_from=config_from_hugging_face,
    config_to=config_to_hugging_face,
    extra_tensors=extra_tensors,
    embedding=EMBEDDING,
    head=HEAD,
    is_tied=IS_TIED,
    replaced=("num_labels", "is_gated_act", "dense_act_fn"),
    auto_class=lambda config: "AutoModelForSeq2SeqLM",
)
