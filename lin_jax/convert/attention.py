"""Another attention for the same weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lin_jax.attentions.settings import AttentionConfig
from lin_jax.convert.hugging_face import ModelWeights, shapes_of
from lin_jax.experiment import Config
from lin_jax.models.gpt2_settings import Gpt2Config
from lin_jax.models.llama_settings import LlamaConfig
from lin_jax.models.settings import ModelConfig
from lin_jax.settings.base import require
from lin_jax.settings.command_line import apply_overrides

# Where parameters of linearized attention start, by the last part of their path: as a fresh model's.
STARTS = {"alpha": 0.0, "filter": 0.0, "local_factor": 1.0}


@dataclasses.dataclass(frozen=True)
class Changed:
    """Weights with another attention, and the paths that are new in it or have no place there."""

    weights: ModelWeights
    new: tuple[str, ...]
    unused: tuple[str, ...]


def target_config(config: Config, attention: str | None, overrides: list[str]) -> Config:
    """The settings of the result.

    Args:
        config: the source's.
        attention: a name of `lin_jax.attentions.settings.ABLATIONS`; None keeps the source's attention.
        overrides: `--config.model.field=value`.

    Raises:
        ConfigError: an override that does not exist or is not of the model.
    """
    for override in overrides:
        require(override.startswith("--config.model."), f"{override}: only --config.model fields can be given here")
    if attention is not None:
        overrides = [f"--config.model.attention={attention}", *overrides]
    if overrides and config.model.attention.kind != "augmented":
        start = dataclasses.replace(config.model, attention=_start(config.model))
        config = dataclasses.replace(config, model=start)
    return apply_overrides(config, overrides)


def _start(model: ModelConfig) -> AttentionConfig:
    """What a change of a model that is not linearized starts from."""
    transformer = isinstance(model, LlamaConfig | Gpt2Config)
    return type(model)().attention if transformer else model.attention


def change_attention(weights: ModelWeights, config: ModelConfig, dtype: str | None = None) -> Changed:
    """`weights` in a model of `config`: parameters that only it has start as in a fresh model, in float32 or `dtype`.

    Raises:
        ConfigError: the models differ in more than their attention.
    """
    shapes, arrays = shapes_of(config), weights.arrays
    new = tuple(path for path in shapes if path not in arrays)
    unused = tuple(path for path in arrays if path not in shapes)
    for path in new:
        require(_last(path) in STARTS, f"{path} of the result is not in the source: only its attention can change")
    for path in unused:
        require(_last(path) in STARTS, f"the result has no place for {path}: only its attention can change")
    found = {path: array for path, array in arrays.items() if path in shapes}
    _check_shapes(found, shapes)
    for path in new:
        found[path] = jnp.full(shapes[path].shape, STARTS[_last(path)], dtype or shapes[path].dtype)
    arrays = {path: found[path] for path in shapes}
    return Changed(dataclasses.replace(weights, config=config, arrays=arrays), new, unused)


def _check_shapes(arrays: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    for path, array in arrays.items():
        expected = shapes[path].shape
        require(
            array.shape == expected,
            f"{path} has shape {array.shape} in the source, but the settings of the result need {expected}",
        )


def _last(path: str) -> str:
    return path.rpartition(".")[2]
