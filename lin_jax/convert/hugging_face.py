"""Directories of Hugging Face: config.json, tensors, tokenizer."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array

from lin_jax.config import ConfigError, Gpt2Config, LlamaConfig, ModelConfig, require
from lin_jax.convert import gpt2, llama
from lin_jax.convert.checkpoint_files import CheckpointFiles, write_tensors
from lin_jax.convert.names import each_of_theirs, parameters, read
from lin_jax.models.registry import create_model
from lin_jax.train.state import make_structure

# model_type of config.json -> what knows its names.
FAMILIES: dict[str, ModuleType] = {"llama": llama, "gpt2": gpt2}
_TYPES: dict[type, ModuleType] = {LlamaConfig: llama, Gpt2Config: gpt2}


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model as its settings and its parameters by path; see `lin_jax.convert.names.parameters`."""

    config: ModelConfig
    arrays: Mapping[str, Array]

    def model(self) -> Any:
        """The model."""
        structure = make_structure(lambda rngs: create_model(self.config, rngs))
        return structure.merge(self.nested(), {})

    def nested(self) -> dict[str, Any]:
        """The parameters as the tree that checkpoints hold."""
        return nnx.traversals.unflatten_mapping({tuple(path.split(".")): a for path, a in self.arrays.items()})


def shapes_of(config: ModelConfig) -> dict[str, Any]:
    """Shape and type of every parameter by path."""
    return parameters(nnx.eval_shape(lambda: create_model(config, nnx.Rngs(0))))


def read_hugging_face(directory: Path) -> Weights:
    """The model of a directory.

    Raises:
        ConfigError: it is not one, of an unknown architecture, or its files do not agree with each other.
    """
    values = read_config(directory)
    kind = values.get("model_type")
    require(kind in FAMILIES, f"{directory}: unknown architecture {kind!r}; there are {', '.join(FAMILIES)}")
    family, files = FAMILIES[str(kind)], CheckpointFiles(directory)
    config = family.config_from_hugging_face(values, files.shapes)
    table = family.name_table(config)
    theirs = _Prefixed(files, "transformer.") if family is gpt2 and "wte.weight" in files else files
    return Weights(config, read(shapes_of(config), table, theirs, config.depth, family.ignored(config)))


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of config.json; raises `ConfigError` without it."""
    file = directory / "config.json"
    require(file.is_file(), f"{directory} has no config.json, and is no run of lin_jax")
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    require(isinstance(values, dict), f"{file} holds no settings")
    return values


class _Prefixed(Mapping[str, np.ndarray]):
    """Tensors under names with a prefix that the first published files of GPT-2 lack."""

    def __init__(self, files: CheckpointFiles, prefix: str):
        self._files, self._prefix = files, prefix

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name.removeprefix(self._prefix)]

    def __iter__(self) -> Iterator[str]:
        return (self._prefix + name for name in self._files)

    def __len__(self) -> int:
        return len(self._files)


def write_hugging_face(directory: Path, weights: Weights, dtype: str, more: Mapping[str, Any]) -> None:
    """Write config.json and tensors.

    Args:
        directory: exists.
        weights: the model.
        dtype: type of the tensors.
        more: further entries of config.json, such as the ids of the tokens that begin and end a text.

    Raises:
        ConfigError: Hugging Face has no such model.
    """
    family, config = family_of(weights.config), weights.config
    values = {**family.config_to_hugging_face(config), "torch_dtype": dtype, **more}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    write_tensors(directory, _tensors(family, weights, np.dtype(dtype)))


def family_of(config: ModelConfig) -> ModuleType:
    """What knows the names of a model; raises `ConfigError` where Hugging Face has no such model."""
    family = _TYPES.get(type(config))
    if family is None:
        raise ConfigError(
            f"only {' and '.join(FAMILIES)} models are converted, but this is a {config.architecture} model"
        )
    return family


def _tensors(family: ModuleType, weights: Weights, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    table, depth = family.name_table(weights.config), weights.config.depth
    for name, array in each_of_theirs(table, weights.arrays, depth):
        yield name, array.astype(dtype)
    for name, array in family.extra_tensors(weights.config).items():
        yield name, array.astype(dtype)
