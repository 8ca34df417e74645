"""What is known of a model's form elsewhere: the names of its tensors, its config.json; asked of the model by name."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lin_jax.attentions.registry import ATTENTIONS
from lin_jax.convert.names import Entry, centred_filter, full_filter, scalar
from lin_jax.convert.tensors import Tensors
from lin_jax.models.base import ModelConfig
from lin_jax.models.registry import MODELS
from lin_jax.settings.base import ConfigError
from lin_jax.settings.foreign import Fields


def _as_they_are(tensors: Tensors) -> Tensors:
    return tensors


def _causal(config: Any) -> str:
    return "AutoModelForCausalLM"


class Conversion(NamedTuple):
    """A model's form in Hugging Face's library; `Model.conversion` names it.

    Attributes:
        model_type: of config.json.
        name_table: settings to one `Entry` per parameter.
        ignored: settings to the ends of names that hold no parameters.
        config_from: config.json and the shapes of the tensors to settings.
        config_to: settings to the contents of a config.json.
        extra_tensors: settings to tensors that hold no parameters, by name.
        embedding: name of the embedding's tensor.
        head: name of the head's.
        is_tied: whether they are one where config.json does not say.
        replaced: entries of config.json that say what others say which `config_to` writes.
        conv1d: projections, by the end of their names, whose matrices are [inputs, outputs].
        renamed: the tensors of a directory under the names of the table, where files have had others.
        auto_class: settings to the class of transformers that computes what our model gives when it is called.
    """

    model_type: str
    name_table: Callable[[Any], list[Entry]]
    ignored: Callable[[Any], tuple[str, ...]]
    config_from: Callable[[Fields, Mapping[str, tuple[int, ...]]], Any]
    config_to: Callable[[Any], dict[str, Any]]
    extra_tensors: Callable[[Any], dict[str, np.ndarray]]
    embedding: str
    head: str
    is_tied: bool
    replaced: tuple[str, ...] = ()
    conv1d: tuple[str, ...] = ()
    renamed: Callable[[Tensors], Tensors] = _as_they_are
    auto_class: Callable[[Any], str] = _causal


def conversion_of(config: ModelConfig) -> Conversion:
    """Return what knows the names of a model; raises `ConfigError` where Hugging Face has no such model."""
    found = _conversions().get(config.architecture)
    if found is None:
        known = ", ".join(_conversions())
        raise ConfigError(f"only {known} models have Hugging Face's form, but this is a {config.architecture} model")
    return found


def conversion_of_type(model_type: object, where: str) -> Conversion:
    """Return what knows the names of the models of a config.json; raises `ConfigError` where none does."""
    by_type = {conversion.model_type: conversion for conversion in _conversions().values()}
    if model_type not in by_type:
        raise ConfigError(f"{where}: unknown architecture {model_type!r}; there are {', '.join(by_type)}")
    return by_type[str(model_type)]


def _conversions() -> dict[str, Conversion]:
    """All of them, by architecture."""
    named = {architecture: MODELS[architecture].conversion for architecture in MODELS}
    return {name: _loaded(conversion) for name, conversion in named.items() if conversion is not None}


def _loaded(conversion: Any) -> Conversion:
    if not isinstance(conversion, str):
        return conversion
    module, _, attribute = conversion.partition(":")
    return getattr(importlib.import_module(module), attribute)


def attention_entries(
    config: ModelConfig, family: str, theirs: str, ours: str, *, field: str = "attention", of_memory: bool = False
) -> list[Entry]:
    """Return the entries of what linearized attention adds to a layer.

    Args:
        config: of the model.
        family: whose names they are, see `Attention.official_names`.
        theirs: how their names begin.
        ours: how our paths begin.
        field: which of the model's settings are those of the attention.
        of_memory: whether its keys and values are those of another sequence.
    """
    attention, table = getattr(config, field), []
    # Kinds that have no memory need not know that there are others.
    options = {"of_memory": True} if of_memory else {}
    for name in ATTENTIONS[attention.kind].official_names(attention, family, **options):
        pair = theirs + name.theirs, ours + name.ours
        if name.form == "scalar":
            table.append(scalar(*pair))
        elif name.form == "centred_filter":
            table.append(centred_filter(*pair, attention.convolution))
        elif name.form == "full_filter":
            table.append(full_filter(*pair))
        else:
            table.append(Entry(*pair))
    return table
