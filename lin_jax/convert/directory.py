"""Writes whole directories: runs of lin_jax and those of Hugging Face, with their tokenizers."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from etils import epath

from lin_jax.convert.hub import TOKENIZER_FILES
from lin_jax.convert.hugging_face import ModelWeights, nested, write_hugging_face
from lin_jax.convert.medusa import write_heads
from lin_jax.convert.source import ModelSource
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.settings.base import ConfigError, require
from lin_jax.train.saved_model import save_model
from lin_jax.train.workdir import KEPT_TOKENIZER, tokenizer_directory


@contextlib.contextmanager
def replacing(target: Path, overwrite: bool) -> Iterator[Path]:
    """A directory beside `target`, which takes its place once all is written; after an error nothing is left of it.

    Raises:
        ConfigError: `target` exists and is not empty, and either `overwrite` is false or it is not of this program.
    """
    check_target(target, overwrite)
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


def check_target(directory: epath.PathLike, overwrite: bool) -> None:
    """Raise `ConfigError` where `replacing` would."""
    target = epath.Path(directory)
    require(not target.exists() or target.is_dir(), f"{target} exists and is not a directory")
    if not target.exists() or not any(target.iterdir()):
        return
    require(overwrite, f"{target} is not empty: give --overwrite, or another --output")
    ours = (target / "config.json").is_file() or (target / "checkpoints").is_dir()
    require(ours, f"{target} holds no model, so --overwrite does not remove it: choose another --output")


def write_run(directory: Path, source: ModelSource, weights: ModelWeights, target: str) -> None:
    """Write a run of lin_jax to `directory`, which will become `target`."""
    _check_space(directory, weights, None)
    config = dataclasses.replace(source.config, model=weights.config, workdir=target)
    try:
        save_model(str(directory), nested(weights.arrays), config, source.tokenizer, nested(weights.constants))
    except Exception as error:  # of the checkpoint library, which tells a full disk in several ways
        raise ConfigError(f"{target} cannot be written: {str(error).strip().splitlines()[0][:300]}") from error
    kept = Path(tokenizer_directory(str(directory))) / KEPT_TOKENIZER
    kept.mkdir()
    copy_tokenizer(source.tokenizer_files, kept)
    if source.entries:
        (kept / "config.json").write_text(json.dumps(source.entries, indent=2) + "\n", encoding="utf-8")
    _write_heads(directory, source)


def write_transformers(directory: Path, source: ModelSource, weights: ModelWeights, dtype: str | None) -> None:
    """Write a directory that Hugging Face's library loads; `dtype` None keeps the type of each tensor."""
    _check_space(directory, weights, dtype)
    ends = source.tokenizer.end_ids
    tokens = {"bos_token_id": source.tokenizer.begin_id, "eos_token_id": ends[0] if len(ends) == 1 else list(ends)}
    write_hugging_face(directory, weights, dtype, {**tokens, **source.entries})
    copy_tokenizer(source.tokenizer_files, directory)
    _name_special_tokens(directory, source.tokenizer)
    _write_heads(directory, source)


def _write_heads(directory: Path, source: ModelSource) -> None:
    if source.heads is not None:
        write_heads(directory, source.heads)


def _name_special_tokens(directory: Path, tokenizer: Tokenizer) -> None:
    """Say which tokens begin and end a text, for a tokenizer that did not come from Hugging Face."""
    file = directory / "tokenizer_config.json"
    if file.exists() or not (directory / "tokenizer.json").is_file():
        return
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.decode([tokenizer.end_id])}
    if tokenizer.begin_id is not None:
        values["bos_token"] = tokenizer.decode([tokenizer.begin_id])
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer in Hugging Face's form, as far as they are there."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _check_space(directory: Path, weights: ModelWeights, dtype: str | None) -> None:
    needed = sum(array.size * np.dtype(dtype or array.dtype).itemsize for array in weights.arrays.values())
    free = shutil.disk_usage(directory).free
    require(needed <= free, f"{directory.parent} has {free:,} bytes left, but the tensors need {needed:,}")
