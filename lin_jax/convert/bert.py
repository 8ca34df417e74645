"""Hugging Face's BERT, with any of its heads of pretraining and classification or none, and our Bert."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lin_jax.convert.conversion import Conversion, attention_entries
from lin_jax.convert.hugging_face_config import attention_from, attention_to, compute_type, labels_from, labels_to
from lin_jax.convert.names import Entry, transposed
from lin_jax.convert.tensors import Renamed, Tensors
from lin_jax.models.bert import ACTIVATIONS, BertConfig
from lin_jax.settings.foreign import Fields

# The names of what may be tied, and whether it is where config.json does not say.
EMBEDDING = "bert.embeddings.word_embeddings.weight"
HEAD, IS_TIED = "cls.predictions.decoder.weight", True
# Where transformers keeps a model's parts when it has a head, and how the names of heads begin.
_INSIDE, _HEADS = "bert.", ("cls.", "classifier.")
_LINEAR = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "output",
    "intermediate.dense": "up",
    "output.dense": "down",
}
_NORMS = {"attention.output.LayerNorm": "attention_norm", "output.LayerNorm": "feed_forward_norm"}
_EMBEDDINGS = {
    "word_embeddings": "embedding",
    "position_embeddings": "position_embedding",
    "token_type_embeddings": "token_type_embedding",
}


def name_table(config: BertConfig) -> list[Entry]:
    """One entry a parameter."""
    inside = _INSIDE if _has_head(config) else ""
    layer = inside + "encoder.layer.{layer}."
    table = [Entry(f"{inside}embeddings.{theirs}.weight", ours) for theirs, ours in _EMBEDDINGS.items()]
    table += _norm(f"{inside}embeddings.LayerNorm", "embedding_norm")
    for theirs, ours in _LINEAR.items():
        table += _linear(layer + theirs, f"layers.{ours}")
    for theirs, ours in _NORMS.items():
        table += _norm(layer + theirs, f"layers.{ours}")
    if config.pooler:
        table += _linear(f"{inside}pooler.dense", "pooler")
    if config.masked_head:
        table += _linear("cls.predictions.transform.dense", "masked_head.dense")
        table += _norm("cls.predictions.transform.LayerNorm", "masked_head.norm")
        table.append(Entry("cls.predictions.bias", "masked_head.bias"))
        if not config.tie_embeddings:
            table.append(transposed(HEAD, "logits.kernel"))
    if config.next_sentence:
        table += _linear("cls.seq_relationship", "next_sentence")
    if config.labels:
        table += _linear("classifier", "score")
    return table + attention_entries(config, "bert", f"{layer}attention.self.", "layers.mixing.")


def _linear(theirs: str, ours: str) -> list[Entry]:
    return [transposed(f"{theirs}.weight", f"{ours}.kernel"), Entry(f"{theirs}.bias", f"{ours}.bias")]


def _norm(theirs: str, ours: str) -> list[Entry]:
    return [Entry(f"{theirs}.{name}", f"{ours}.{name}") for name in ("weight", "bias")]


def _has_head(config: BertConfig) -> bool:
    return config.masked_head or config.next_sentence or config.labels > 0


def ignored(config: BertConfig) -> tuple[str, ...]:
    """Ends of names that hold no parameters: numbers of positions, a second copy of a bias."""
    return ("embeddings.position_ids", "cls.predictions.decoder.bias")


def renamed(tensors: Tensors) -> Tensors:
    """Return the tensors under the names that transformers writes today: old files say gamma and beta.

    A model has the prefix of its parts where it has a head, and only there.
    """
    inside = any(name.startswith(_HEADS) for name in tensors)
    found = {_name_today(name, inside): name for name in tensors}
    return tensors if all(ours == theirs for ours, theirs in found.items()) else Renamed(tensors, found)


def _name_today(name: str, inside: bool) -> str:
    name = re.sub(r"\bLayerNorm\.(gamma|beta)$", lambda found: _OLD[found[0]], name)
    if name.startswith(_HEADS):
        return name
    return (_INSIDE if inside else "") + name.removeprefix(_INSIDE)


_OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def config_from_hugging_face(fields: Fields, shapes: Mapping[str, tuple[int, ...]]) -> BertConfig:
    """Our config of a config.json and the shapes of its tensors.

    Raises:
        ConfigError: something is missing, of another type, or is not supported.
    """
    activation = fields.get("hidden_act", str, "gelu")
    activation = "gelu_new" if activation == "gelu_pytorch_tanh" else activation
    fields.require(
        activation in ACTIVATIONS, f"hidden_act={activation} is not supported; there are {', '.join(ACTIVATIONS)}"
    )
    positions = fields.get("position_embedding_type", str, "absolute")
    fields.require(positions == "absolute", f"position_embedding_type={positions} is not supported, only absolute")
    decodes = fields.get("is_decoder", bool, False)
    fields.require(not decodes, "is_decoder=true is not supported: a BERT reads whole texts")
    head = shapes.get("classifier.weight", ())
    labels = head[0] if len(head) == 2 else 0
    inside = _INSIDE if any(name.startswith(_HEADS) for name in shapes) else ""
    return BertConfig(
        vocabulary_size=fields.get("vocab_size", int),
        width=fields.get("hidden_size", int),
        depth=fields.get("num_hidden_layers", int),
        heads=fields.get("num_attention_heads", int),
        feed_forward_size=fields.get("intermediate_size", int),
        activation=activation,  # type: ignore[arg-type]
        positions=fields.get("max_position_embeddings", int, 512),
        token_types=fields.get("type_vocab_size", int, 2),
        norm_epsilon=fields.get("layer_norm_eps", float, 1e-12),
        pooler=f"{inside}pooler.dense.weight" in shapes,
        masked_head="cls.predictions.bias" in shapes,
        next_sentence="cls.seq_relationship.weight" in shapes,
        tie_embeddings=fields.get("tie_word_embeddings", bool, IS_TIED),
        labels=labels,
        label_names=labels_from(fields, labels),
        attention=attention_from(fields, None, causal=False),
        dtype=compute_type(fields),
    )


def config_to_hugging_face(config: BertConfig) -> dict[str, Any]:
    """The contents of a config.json."""
    heads = {
        "BertForSequenceClassification": config.labels > 0,
        "BertForPreTraining": config.masked_head and config.next_sentence,
        "BertForMaskedLM": config.masked_head,
        "BertModel": True,
    }
    return {
        "architectures": [next(name for name, has in heads.items() if has)],
        "model_type": "bert",
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.feed_forward_size,
        "hidden_act": config.activation,
        "max_position_embeddings": config.positions,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        **labels_to(config),
        **attention_to(config.attention),
    }


def extra_tensors(config: BertConfig) -> dict[str, np.ndarray]:
    """None: numbers of positions are computed."""
    return {}


CONVERSION = Conversion(
    model_type="bert",
    name_table=name_table,
    ignored=ignored,
    config_from=config_from_hugging_face,
    config_to=config_to_hugging_face,
    extra_tensors=extra_tensors,
    embedding=EMBEDDING,
    head=HEAD,
    is_tied=IS_TIED,
    replaced=("num_labels",),
    renamed=renamed,
    auto_class=lambda config: "AutoModelForMaskedLM" if config.masked_head else "AutoModel",
)
