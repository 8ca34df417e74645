"""Another attention for the same weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lin_jax.convert.hugging_face import ModelWeights, shapes_of
from lin_jax.experiment import Config
from lin_jax.models.base import ModelConfig
from lin_jax.models.flops import roles_of
from lin_jax.models.registry import create_model
from lin_jax.models.structure import make_structure
from lin_jax.settings.base import require
from lin_jax.settings.command_line import apply_overrides

# Of the random numbers of new parameters.
SEED = 0


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
        attention: a name of `lin_jax.attentions.registry.preset_names`, for all attentions of the model; None keeps
            the source's.
        overrides: `--config.model.field=value`.

    Raises:
        ConfigError: an override that does not exist or is not of the model.
    """
    for override in overrides:
        require(override.startswith("--config.model."), f"{override}: only --config.model fields can be given here")
    if attention is not None:
        chosen = [f"--config.model.{name}={attention}" for name in config.model.attention_fields]
        overrides = [*chosen, *overrides]
    return apply_overrides(config, overrides)


def change_attention(weights: ModelWeights, config: ModelConfig, dtype: str | None = None) -> Changed:
    """`weights` in a model of `config`: parameters that only it has start as in a fresh model, in float32 or `dtype`.

    Raises:
        ConfigError: the models differ in more than their attention.
    """
    shapes, arrays = shapes_of(config), weights.arrays
    new = tuple(path for path in shapes if path not in arrays)
    unused = tuple(path for path in arrays if path not in shapes)
    roles = {".".join(path): roles for of in (weights.config, config) for path, roles in roles_of(of).items()}
    for path in new:
        require("new" in roles[path], f"{path} of the result is not in the source: only its attention can change")
    for path in unused:
        require("new" in roles[path], f"the result has no place for {path}: only its attention can change")
    found = {path: array for path, array in arrays.items() if path in shapes}
    _check_shapes(found, shapes)
    starts, fresh = _starts(config, new)
    for path, start in starts.items():
        found[path] = start.astype(dtype or shapes[path].dtype)
    arrays = {path: found[path] for path in shapes}
    kept = {path: array for path, array in weights.constants.items() if path in fresh}
    _check_shapes(kept, fresh)
    changed = dataclasses.replace(weights, config=config, arrays=arrays, constants={**fresh, **kept})
    return Changed(changed, new, unused)


def _check_shapes(arrays: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    for path, array in arrays.items():
        expected = shapes[path].shape
        require(
            array.shape == expected,
            f"{path} has shape {array.shape} in the source, but the settings of the result need {expected}",
        )


def _starts(config: ModelConfig, paths: Sequence[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Some parameters and the constants of a fresh model; its other parameters are never made."""
    structure = make_structure(lambda rngs: create_model(config, rngs))

    @jax.jit
    def start() -> tuple[dict[str, Array], dict[str, Array]]:
        parameters, constants = map(nnx.traversals.flatten_mapping, structure.initialise(jnp.uint32(SEED)))
        chosen = {path: parameters[tuple(path.split("."))] for path in paths}
        return chosen, {".".join(path): array for path, array in constants.items()}

    return start()
