"""Models in Hugging Face's form as `finetune.checkpoint`: what `lin_jax.train.base` asks for by this module's name."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from etils import epath
from jax.sharding import Mesh

from lin_jax.convert.directory import copy_tokenizer
from lin_jax.convert.hugging_face import Placement, read_hugging_face, read_model_settings
from lin_jax.models.base import ModelConfig
from lin_jax.paths import write_whole


def load_base(path: str, mesh: Mesh) -> tuple[Any, ModelConfig]:
    """Return the model of a directory, and its settings."""
    weights = read_hugging_face(Path(path), placement=Placement(mesh))
    return weights.model(), weights.config


def keep_tokenizer(path: str, target: epath.Path) -> None:
    """Copy what a directory says of its tokenizer and model, as `convert_weights.py` keeps it in a run."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        copy_tokenizer(Path(path), Path(directory))
        shutil.copyfile(Path(path) / "config.json", Path(directory) / "config.json")
        for file in Path(directory).iterdir():
            write_whole(target / file.name, file.read_bytes())


def read_base_settings(path: str) -> ModelConfig:
    """Return the settings of a directory's model."""
    return read_model_settings(Path(path))
