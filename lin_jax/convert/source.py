"""The models that can be read: runs of lin_jax, directories of Hugging Face, files of other code."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lin_jax.convert import flash, llama
from lin_jax.convert.checkpoint_files import CheckpointFiles
from lin_jax.convert.hub import local_path
from lin_jax.convert.hugging_face import ModelWeights, Placement, read_config, read_hugging_face, read_tensors
from lin_jax.convert.llama2c import Llama2cFile, is_llama2c
from lin_jax.convert.medusa import find_heads, read_heads
from lin_jax.convert.tensors import Tensors
from lin_jax.data.tokenizers import Tokenizer, load_tokenizer
from lin_jax.experiment import Config
from lin_jax.layers.lora import merge_lora
from lin_jax.layers.parameter import constants_by_path, parameters_by_path
from lin_jax.models.base import ModelConfig
from lin_jax.models.flash import FlashConfig
from lin_jax.models.medusa import MedusaHeads, check_heads
from lin_jax.settings.base import require
from lin_jax.settings.command_line import apply_overrides
from lin_jax.settings.data import DataConfig
from lin_jax.settings.finetune import FinetuneConfig
from lin_jax.train.saved_model import load_model
from lin_jax.train.workdir import is_run, tokenizer_files

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Input:
    """What is to be read.

    Attributes:
        name: a directory, a file, or a model's name on the Hugging Face Hub.
        tokenizer: a directory or name of a tokenizer, or "bytes"; None takes the source's own.
        adapter: the directory of a LoRA adapter that is merged into a model in Hugging Face's form.
        overrides: `--config.model.field=value`: what an official FLASH does not tell of itself.
    """

    name: str
    tokenizer: str | None = None
    adapter: Path | None = None
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model that was read.

    Attributes:
        weights: settings and parameters.
        config: all settings of the run; for another source, those with which it is evaluated.
        tokenizer: of the model.
        tokenizer_files: a directory with the tokenizer's files in Hugging Face's form.
        heads: the model's Medusa heads, or None.
        entries: of the config.json that the model came with: names of labels, ids of tokens, and all else that goes
            back with it.
    """

    weights: ModelWeights
    config: Config
    tokenizer: Tokenizer
    tokenizer_files: Path
    heads: MedusaHeads | None = None
    entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_source(given: Input, placement: Placement) -> ModelSource:
    """The model that is meant, of any kind that can be read.

    Raises:
        ConfigError: it is of none, or its parts do not agree.
    """
    path = local_path(given.name)
    if is_run(str(path)):
        require(
            given.adapter is None, "--adapter is for models in Hugging Face's form, but --input is a run of lin_jax"
        )
        return _read_run(path, given, placement)
    if (path / "config.json").is_file():
        weights = read_hugging_face(path, given.adapter, placement)
        source = _source(weights, *_tokenizer_of(path, given.tokenizer or str(path)))
        heads, entries = _heads_beside(path, weights.config), _entries(path, given)
        return dataclasses.replace(source, heads=heads, entries=entries)
    require(given.adapter is None, f"--adapter is for models in Hugging Face's form, but {path} has no config.json")
    weights = (
        _read_llama2c(path, placement) if path.is_file() and is_llama2c(path) else _read_flash(path, given, placement)
    )
    require(given.tokenizer is not None, f"{path} has no tokenizer: give --tokenizer DIR")
    return _source(weights, *_tokenizer_of(path, str(given.tokenizer)))


def _read_run(path: Path, given: Input, placement: Placement) -> ModelSource:
    model, tokenizer, config = load_model(str(path), placement.mesh)
    merge_lora(model)
    heads = _heads_beside(path, config.model) if model.medusa is None else model.medusa
    model.medusa = None
    arrays, constants = parameters_by_path(model), constants_by_path(model)
    del model  # It holds them too.
    for name, array in arrays.items():
        arrays[name] = array.astype(placement.type_of(array.dtype.name))
    weights = ModelWeights(config.model, arrays, constants=constants)
    _require_finite(arrays, path)
    files = Path(tokenizer_files(str(path)))
    entries = _entries(files, given)
    if given.tokenizer is not None:
        tokenizer, files = _tokenizer_of(path, given.tokenizer)
    _require_known_tokens(tokenizer, weights.config, str(files))
    return ModelSource(weights, _on_its_own(config, str(files)), tokenizer, files, heads, entries)


def _entries(directory: Path, given: Input) -> Mapping[str, Any]:
    """What the config.json of a directory holds, if it has one; without ids of tokens where these are another's."""
    if not (directory / "config.json").is_file():
        return {}
    values = read_config(directory).values
    return values if given.tokenizer is None else {name: values[name] for name in values if name not in _TOKEN_IDS}


def _require_finite(arrays: Mapping[str, Array], path: Path) -> None:
    """Raise `ConfigError` for parameters of a run that are no numbers; those of others are checked as they are read."""
    for name, array in arrays.items():
        wrong = int(_count_of_no_numbers(array))
        require(wrong == 0, f"{path}: {wrong} of the {array.size} numbers of {name} are NaN or infinite")


@jax.jit
def _count_of_no_numbers(array: Array) -> Array:
    return jnp.sum(~jnp.isfinite(array))


def _heads_beside(directory: Path, config: ModelConfig) -> MedusaHeads | None:
    """The Medusa heads in a file beside a model."""
    file = find_heads(directory)
    if file is None:
        return None
    heads = read_heads(file)
    check_heads(heads, config)
    return heads


def _on_its_own(config: Config, tokenizer: str) -> Config:
    """The settings without the model that a run was started from."""
    data = config.data
    if data.tokenizer == "checkpoint":
        data = dataclasses.replace(data, tokenizer=tokenizer)
    train = dataclasses.replace(config.train, epochs=0.0)  # Only some tasks count them.
    return dataclasses.replace(config, data=data, train=train, finetune=FinetuneConfig())


def _read_llama2c(file: Path, placement: Placement) -> ModelWeights:
    tensors = Llama2cFile(file)
    return read_tensors(tensors.config, llama.name_table(tensors.config), tensors, (), placement)


def _read_flash(path: Path, given: Input, placement: Placement) -> ModelWeights:
    tensors = _flash_tensors(path)
    config = Config(model=flash.config_from_shapes(tensors.shapes))
    model = apply_overrides(config, given.overrides).model
    assert isinstance(model, FlashConfig)
    table = flash.name_table(model, flash.kernel_of(tensors.shapes))
    return read_tensors(model, table, tensors, flash.ignored(model), placement)


def _flash_tensors(path: Path) -> Tensors:
    kind = "of an official FLASHTransformer, of llama2.c, nor of a model with its config.json beside it"
    require(path.is_file() or any(path.glob("*model*")), f"{path} has no config.json, and is no run of lin_jax")
    tensors = CheckpointFiles(path)
    require(flash.is_official(tensors), f"{path} has no config.json, and its tensors are neither {kind}")
    return flash.without_prefix(tensors)


def _tokenizer_of(path: Path, name: str) -> tuple[Tokenizer, Path]:
    return load_tokenizer(DataConfig(tokenizer=name), path), Path(name)


def _source(weights: ModelWeights, tokenizer: Tokenizer, files: Path) -> ModelSource:
    _require_known_tokens(tokenizer, weights.config, str(files))
    data = DataConfig(tokenizer=str(files), sequence_length=tokens_in(weights.config, DataConfig().sequence_length))
    return ModelSource(weights, Config(model=weights.config, data=data), tokenizer, files)


def _require_known_tokens(tokenizer: Tokenizer, config: ModelConfig, name: str) -> None:
    size = config.vocabulary_size
    require(
        tokenizer.vocabulary_size <= size,
        f"{name}: its tokenizer has {tokenizer.vocabulary_size} tokens, but its model knows {size}",
    )


def tokens_in(config: ModelConfig, otherwise: int) -> int:
    """Tokens of the longest row that a model takes; `otherwise` for one that takes any."""
    return getattr(config, "positions", otherwise)
