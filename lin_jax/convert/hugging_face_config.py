"""What the config.json files of all architectures have in common."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from lin_jax.attentions.base import AttentionConfig
from lin_jax.attentions.registry import ATTENTIONS
from lin_jax.attentions.softmax import SoftmaxConfig
from lin_jax.settings.dictionaries import section_from_dict, section_to_dict
from lin_jax.settings.foreign import Fields

# Our key in a config.json: which attention the tensors were trained with. Other programs pass over it.
KEY = "lin_jax"
# Entries that are written from what a model is now, or left out; the others of a source's config.json go on.
WRITTEN = (KEY, "dtype", "torch_dtype")


def attention_from(
    fields: Fields, official: AttentionConfig | None, name: str = "attention", *, causal: bool = True
) -> AttentionConfig:
    """The attention under our key; else what the names of the tensors tell; else softmax.

    Args:
        fields: config.json.
        official: what the names of the tensors tell; None: nothing.
        name: of the attention among the model's settings.
        causal: whether softmax attention is to be.
    """
    ours = fields.section(KEY)
    if name in ours or (KEY in fields and name == "attention"):
        return section_from_dict(ours.get(name, dict), ATTENTIONS, f"{fields.place}: {KEY}.{name}", "augmented")
    return official or SoftmaxConfig(causal=causal)


def attention_to(*attentions: AttentionConfig, names: Sequence[str] = ("attention",)) -> dict[str, Any]:
    """What `attention_from` reads of attentions of these names; nothing for a plain softmax model."""
    if all(attention.kind == "softmax" for attention in attentions):
        return {}
    return {KEY: {name: _settings_of(attention) for name, attention in zip(names, attentions, strict=True)}}


def _settings_of(attention: AttentionConfig) -> dict[str, Any]:
    # The form that computes it belongs to a machine, not to a checkpoint.
    return {name: value for name, value in section_to_dict(attention).items() if name != "implementation"}


def labels_from(fields: Fields, count: int) -> tuple[str, ...]:
    """Return the names of `count` classes; none where they are those that transformers makes up."""
    named = fields.section("id2label")
    names = tuple(named.get(str(label), str, f"LABEL_{label}") for label in range(count))
    return () if names == _made_up(count) else names


def labels_to(config: Any) -> dict[str, Any]:
    """Return what `labels_from` reads, of the settings of a model; nothing where it has no classes."""
    names = config.label_names or _made_up(config.labels)
    if not names:
        return {}
    by_number = {str(label): name for label, name in enumerate(names)}
    return {"id2label": by_number, "label2id": {name: label for label, name in enumerate(names)}}


def _made_up(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{label}" for label in range(count))


def compute_type(fields: Fields) -> Literal["float32", "bfloat16"]:
    """The type of activations: the one that the weights have, except that float16 is computed in float32."""
    older = fields.get("torch_dtype", str, "float32")
    return "bfloat16" if fields.get("dtype", str, older) == "bfloat16" else "float32"


def names_ending(names: Iterable[str], end: str) -> list[str]:
    """Those names that end with `end`."""
    return [name for name in names if name.endswith(end)]
