"""Reads and writes whole directories: runs of lin_jax and those of Hugging Face, with their tokenizers."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lin_jax.config import Config, ConfigError, DataConfig, FlashConfig, require
from lin_jax.convert.hugging_face import Weights, read_hugging_face, write_hugging_face
from lin_jax.convert.names import parameters
from lin_jax.data.tokenizers import Tokenizer, load_tokenizer
from lin_jax.train.checkpoint import checkpoints_directory, load_model, save_model, tokenizer_directory

# Of a Hugging Face directory, kept in ours so that they can go back as they came.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_KEPT = "hugging_face"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that was read.

    Attributes:
        weights: settings and parameters.
        config: all settings of the run; for a Hugging Face directory, those with which it is evaluated.
        tokenizer: of the model.
        tokenizer_files: a directory with the tokenizer's files in Hugging Face's form.
    """

    weights: Weights
    config: Config
    tokenizer: Tokenizer
    tokenizer_files: Path


def read_source(directory: Path) -> Source:
    """The model in a directory of either kind.

    Raises:
        ConfigError: it is neither, or its parts do not agree.
    """
    require(directory.is_dir(), f"{directory} is not a directory")
    if checkpoints_directory(str(directory)).exists():
        model, tokenizer, config = load_model(str(directory))
        weights = Weights(config.model, parameters(model))
        files = Path(tokenizer_directory(str(directory)))
        return Source(weights, config, tokenizer, files / _KEPT if (files / _KEPT).is_dir() else files)
    weights = read_hugging_face(directory)
    tokenizer = load_tokenizer(DataConfig(tokenizer=str(directory)), directory)
    size = weights.config.vocabulary_size
    require(
        tokenizer.vocabulary_size <= size,
        f"{directory}: its tokenizer has {tokenizer.vocabulary_size} tokens, but its model knows {size}",
    )
    assert not isinstance(weights.config, FlashConfig)
    data = DataConfig(tokenizer=str(directory), sequence_length=weights.config.positions)
    return Source(weights, Config(model=weights.config, data=data), tokenizer, directory)


@contextlib.contextmanager
def replacing(target: Path, overwrite: bool) -> Iterator[Path]:
    """A directory beside `target`, which takes its place once all is written; after an error nothing is left of it.

    Raises:
        ConfigError: `target` exists and is not empty, and either `overwrite` is false or it is not of this program.
    """
    _check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (target.parent / f".{target.name}.{os.getpid()}.{end}" for end in ("new", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    require(not target.exists() or target.is_dir(), f"{target} exists and is not a directory")
    if not target.exists() or not any(target.iterdir()):
        return
    require(overwrite, f"{target} is not empty: give --overwrite, or another --output")
    ours = (target / "config.json").is_file() or (target / "checkpoints").is_dir()
    require(ours, f"{target} holds no model, so --overwrite does not remove it: choose another --output")


def write_run(directory: Path, source: Source, weights: Weights, target: Path) -> None:
    """Write a run of lin_jax to `directory`, which will be renamed to `target`."""
    _check_space(directory, weights, 4)
    config = dataclasses.replace(source.config, model=weights.config, workdir=str(target))
    save_model(str(directory), weights.nested(), config, source.tokenizer)
    kept = Path(tokenizer_directory(str(directory))) / _KEPT
    kept.mkdir()
    _copy_tokenizer(source.tokenizer_files, kept)


def write_transformers(directory: Path, source: Source, weights: Weights, dtype: str) -> None:
    """Write a directory that Hugging Face's library loads."""
    _check_space(directory, weights, np.dtype(dtype).itemsize)
    tokens = {"bos_token_id": source.tokenizer.begin_id, "eos_token_id": source.tokenizer.end_id}
    write_hugging_face(directory, weights, dtype, tokens)
    _copy_tokenizer(source.tokenizer_files, directory)
    _name_special_tokens(directory, source.tokenizer)


def _name_special_tokens(directory: Path, tokenizer: Tokenizer) -> None:
    """Say which tokens begin and end a text, for a tokenizer that did not come from Hugging Face."""
    file = directory / "tokenizer_config.json"
    if file.exists() or not (directory / "tokenizer.json").is_file():
        return
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.decode([tokenizer.end_id])}
    if tokenizer.begin_id is not None:
        values["bos_token"] = tokenizer.decode([tokenizer.begin_id])
    file.write_text(json.dumps(values, indent=2) + "\n")


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _check_space(directory: Path, weights: Weights, itemsize: int) -> None:
    needed = itemsize * sum(array.size for array in weights.arrays.values())
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ConfigError(f"{directory.parent} has {free:,} bytes left, but the tensors need {needed:,}")


def read_back(directory: Path) -> Weights:
    """What was written to a directory of either kind."""
    if not checkpoints_directory(str(directory)).exists():
        return read_hugging_face(directory)
    model, _, config = load_model(str(directory))
    return Weights(config.model, parameters(model))


def tokens_in(config: Any) -> int:
    """Tokens of the longest row that a model takes."""
    return getattr(config, "positions", 1 << 30)
