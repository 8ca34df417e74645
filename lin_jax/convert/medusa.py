"""Medusa heads in files: the official medusa_lm_head.pt or .safetensors, and back."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from lin_jax.convert.checkpoint_files import read_tensors
from lin_jax.convert.names import Entry, read, to_theirs, transposed
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.models.medusa import MedusaHeads
from lin_jax.settings.base import require
from lin_jax.settings.medusa import MedusaConfig

FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
_PREFIX = "medusa_head."


def find_heads(directory: Path) -> Path | None:
    """The file of heads in a directory, if there is one."""
    return next((directory / name for name in FILES if (directory / name).is_file()), None)


def read_heads(file: Path) -> MedusaHeads:
    """The heads in a file.

    Raises:
        ConfigError: it is damaged, or holds something else.
    """
    require(file.is_file(), f"there are no Medusa heads at {file}")
    return heads_from_official(read_tensors(file))


def heads_from_official(tensors: Mapping[str, np.ndarray]) -> MedusaHeads:
    """The heads of the official code's tensors: `i.j.linear` is block j of head i, and `i.n` its last layer."""
    theirs = {name.removeprefix(_PREFIX): array for name, array in tensors.items()}
    last = sorted(match.groups() for name in theirs if (match := re.fullmatch(r"(\d+)\.(\d+)\.weight", name)))
    require(bool(last), "the file holds no Medusa heads: it has no tensor such as 0.1.weight")
    layers = int(last[0][1])
    vocabulary_size, width = theirs[".".join((*last[0], "weight"))].shape
    heads = MedusaHeads(MedusaConfig(heads=len(last), layers=layers), width, vocabulary_size, rngs=nnx.Rngs(0))
    for path, array in read(parameters_by_path(heads), _table(layers), theirs, len(last), ()).items():
        _find(heads, path).set_value(jnp.asarray(array))
    return heads


def heads_to_official(heads: MedusaHeads) -> dict[str, np.ndarray]:
    """The official code's tensors of heads."""
    return to_theirs(_table(heads.config.layers), parameters_by_path(heads), heads.config.heads)


def write_heads(directory: Path, heads: MedusaHeads) -> None:
    """Write heads as safetensors, under the official names."""
    tensors = {name: np.ascontiguousarray(array) for name, array in heads_to_official(heads).items()}
    save_file(tensors, directory / FILES[0], metadata={"format": "pt"})


def _table(layers: int) -> list[Entry]:
    table = [transposed(f"{{layer}}.{layers}.weight", "heads.logits.kernel")]
    for block in range(layers):
        theirs, ours = f"{{layer}}.{block}.linear", f"heads.blocks.{block}"
        table += [transposed(f"{theirs}.weight", f"{ours}.kernel"), Entry(f"{theirs}.bias", f"{ours}.bias")]
    return table


def _find(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = module[name] if name.isdigit() else getattr(module, name)
    return module
