"""Models in Hugging Face's form as `finetune.checkpoint`: what `lin_jax.train.base` asks for by this module's name."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lin_jax.convert.hugging_face import Placement, read_hugging_face, read_model_settings
from lin_jax.models.base import ModelConfig


def load_base(path: str, mesh: Mesh) -> tuple[Any, ModelConfig]:
    """Return the model of a directory, and its settings."""
    weights = read_hugging_face(Path(path), placement=Placement(mesh))
    return weights.model(), weights.config


def read_base_settings(path: str) -> ModelConfig:
    """Return the settings of a directory's model."""
    return read_model_settings(Path(path))
