"""Hugging Face's GPT-2, the official linearized GPT-2, and our Gpt2."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lin_jax.attentions.augmented import AugmentedConfig
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
from lin_jax.convert.tensors import Renamed, Tensors
from lin_jax.models.gpt2 import Gpt2Config
from lin_jax.settings.foreign import Fields

# The names of what may be tied, and whether it is where config.json does not say.
EMBEDDING, HEAD, IS_TIED = "transformer.wte.weight", "lm_head.weight", True
# Hugging Face keeps these matrices as ours, [inputs, outputs].
_LINEAR = {
    "attn.c_attn": "query_key_value",
    "attn.c_proj": "output",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
}
CONV1D = tuple(_LINEAR)
_NORMS = {"ln_1": "attention_norm", "ln_2": "feed_forward_norm"}


def name_table(config: Gpt2Config) -> list[Entry]:
    """One entry a parameter."""
    layer = "transformer.h.{layer}."
    table = [
        Entry(EMBEDDING, "embedding"),
        Entry("transformer.wpe.weight", "position_embedding"),
        Entry("transformer.ln_f.weight", "norm.weight"),
        Entry("transformer.ln_f.bias", "norm.bias"),
    ]
    for theirs, ours in _LINEAR.items():
        table.append(Entry(f"{layer}{theirs}.weight", f"layers.{ours}.kernel"))
        table.append(Entry(f"{layer}{theirs}.bias", f"layers.{ours}.bias"))
    for theirs, ours in _NORMS.items():
        table.append(Entry(f"{layer}{theirs}.weight", f"layers.{ours}.weight"))
        table.append(Entry(f"{layer}{theirs}.bias", f"layers.{ours}.bias"))
    if not config.tie_embeddings:
        table.append(transposed(HEAD, "logits.kernel"))
    if config.labels:
        table.append(transposed("score.weight", "score.kernel"))
    return table + attention_entries(config, "gpt2", layer + "attn.", "layers.mixing.")


def renamed(tensors: Tensors) -> Tensors:
    """Return the tensors under their names of today: the first published files of GPT-2 lack a prefix."""
    if "wte.weight" not in tensors:
        return tensors
    heads = (HEAD, "score.weight")
    return Renamed(tensors, {name if name in heads else f"transformer.{name}": name for name in tensors})


def ignored(config: Gpt2Config) -> tuple[str, ...]:
    """Ends of names that hold no parameters: masks, a filter that the official code never uses."""
    return ("attn.bias", "attn.masked_bias", "attn.dconv_ada2.weight")


def config_from_hugging_face(fields: Fields, shapes: Mapping[str, tuple[int, ...]]) -> Gpt2Config:
    """Our config of a config.json and the shapes of its tensors.

    Raises:
        ConfigError: something is missing, of another type, or is not supported.
    """
    width = fields.get("n_embd", int)
    activation = fields.get("activation_function", str, "gelu_new")
    fields.require(
        activation in ("gelu_new", "gelu_pytorch_tanh"),
        f"activation_function={activation} is not supported; GPT-2's is gelu_new",
    )
    for name, needed in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        found = fields.get(name, bool, needed)
        fields.require(found == needed, f"{name}={str(found).lower()} is not supported")
    labels = shapes["score.weight"][0] if len(shapes.get("score.weight", ())) == 2 else 0
    return Gpt2Config(
        vocabulary_size=fields.get("vocab_size", int),
        width=width,
        depth=fields.get("n_layer", int),
        heads=fields.get("n_head", int),
        feed_forward_size=fields.get("n_inner", int, 4 * width),
        positions=fields.get("n_positions" if "n_positions" in fields else "n_ctx", int),
        norm_epsilon=fields.get("layer_norm_epsilon", float, 1e-5),
        tie_embeddings=fields.get("tie_word_embeddings", bool, IS_TIED),
        labels=labels,
        label_names=labels_from(fields, labels),
        attention=attention_from(fields, _official_attention(shapes)),
        dtype=compute_type(fields),
    )


def _official_attention(shapes: Mapping[str, tuple[int, ...]]) -> AugmentedConfig | None:
    """What the names of an official linearized checkpoint tell: it has both parameters or none."""
    filters = [shape for name, shape in shapes.items() if name.endswith("attn.dconv_ada.weight")]
    kernels = [shape[2] for shape in filters if len(shape) == 4]
    if not kernels or not names_ending(shapes, "attn.alpha"):
        return None
    return AugmentedConfig(group_size=64, convolution=kernels[0] // 2 + 1)


def config_to_hugging_face(config: Gpt2Config) -> dict[str, Any]:
    """The contents of a config.json."""
    return {
        "architectures": ["GPT2ForSequenceClassification" if config.labels else "GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocabulary_size,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.feed_forward_size,
        "n_positions": config.positions,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": "gelu_new",
        "tie_word_embeddings": config.tie_embeddings,
        **labels_to(config),
        **attention_to(config.attention),
    }


def extra_tensors(config: Gpt2Config) -> dict[str, np.ndarray]:
    """None: the official GPT-2 code computes its masks."""
    return {}


CONVERSION = Conversion(
    model_type="gpt2",
    name_table=name_table,
    ignored=ignored,
    config_from=config_from_hugging_face,
    config_to=config_to_hugging_face,
    extra_tensors=extra_tensors,
    embedding=EMBEDDING,
    head=HEAD,
    is_tied=IS_TIED,
    replaced=("n_ctx", "num_labels"),
    conv1d=CONV1D,
    renamed=renamed,
)
