"""LoRA adapters of PEFT, merged into the tensors of the model that they were trained on."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lin_jax.convert.checkpoint_files import CheckpointFiles
from lin_jax.convert.tensors import Index, Tensors
from lin_jax.settings.base import ConfigError, require

_SETTINGS = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Beside the adapter of a LongLoRA: whole parameters, such as embeddings, norms, filters and factors.
_WHOLE = "trainable_params.bin"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB])(?:\.default)?(?:\.weight)?")
# What PEFT puts into the names of a module that it wraps.
_WRAPPED = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")


@dataclasses.dataclass(frozen=True)
class _Update:
    """What is added to a tensor: scale * B A, transposed for embeddings and for Conv1D."""

    a: str
    b: str
    scale: float
    transposed: bool


class Adapted(Tensors):
    """The tensors of a model with an adapter merged into them, computed in float32.

    A tensor that the adapter holds whole takes the place of the model's; one that the model lacks is added. Those with
    an update keep the model's type.

    Args:
        base: the model, under Hugging Face's names.
        directory: `adapter_config.json`, `adapter_model.safetensors` or `.bin`, and maybe `trainable_params.bin`.

    Raises:
        ConfigError: a file is missing or damaged, the kind of adapter is unknown, or it does not fit the model.
    """

    def __init__(self, base: Tensors, directory: Path):
        self._base, self._directory = base, directory
        settings = _read_settings(directory)
        self._factors = CheckpointFiles(_adapter_file(directory))
        self._updates, whole = _sort_names(self._factors, settings, directory)
        self._whole = {name: (self._factors, old) for name, old in whole.items()}
        self._add_whole_parameters()
        _require_saved(settings, self._whole, directory)
        self.shapes, self.types = dict(base.shapes), dict(base.types)
        for name, (tensors, old) in self._whole.items():
            self._require_shape(name, tensors.shapes[old])
            self.shapes[name], self.types[name] = tensors.shapes[old], tensors.types[old]
        for name in self._updates:
            self._require_update_fits(name)

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._whole:
            tensors, old = self._whole[name]
            return tensors[old]
        array = self._base[name]
        everything = (slice(None), slice(None))
        return array if name not in self._updates else self._merge(array, self._updates[name], everything)

    def part(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor, with that part of its update."""
        if name in self._whole:
            tensors, old = self._whole[name]
            return tensors.part(old, index)
        array = self._base.part(name, index)
        return array if name not in self._updates else self._merge(array, self._updates[name], index)

    def _merge(self, array: np.ndarray, update: _Update, index: Index) -> np.ndarray:
        a, b = (self._factors[name].astype(np.float32) for name in (update.a, update.b))
        rows, columns = index[::-1] if update.transposed else index
        change = b[rows] @ a[:, columns]
        change *= update.scale
        change = change.T if update.transposed else change
        return (array + change).astype(array.dtype)

    def _add_whole_parameters(self) -> None:
        file = self._directory / _WHOLE
        if not file.is_file():
            return
        tensors = CheckpointFiles(file)
        for old in tensors:
            name = _plain(old)
            require(name not in self._whole and name not in self._updates, f"{file} and the adapter both hold {name}")
            self._whole[name] = tensors, old

    def _require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        expected = self._base.shapes.get(name, shape)
        require(
            shape == expected,
            f"{self._directory} is an adapter of another model: its {name} has shape {shape}, the model's {expected}",
        )

    def _require_update_fits(self, name: str) -> None:
        where, update = self._directory, self._updates[name]
        require(name in self._base.shapes, f"{where} is an adapter of another model: this one has no {name}")
        require(name not in self._whole, f"{where} holds {name} both whole and as an update")
        a, b = (self._factors.shapes[factor] for factor in (update.a, update.b))
        fits = len(a) == len(b) == 2 and a[0] == b[1]
        require(fits, f"{where}: {update.a} of shape {a} and {update.b} of shape {b} are no factors of a matrix")
        self._require_shape(name, (a[1], b[0]) if update.transposed else (b[0], a[1]))


def _read_settings(directory: Path) -> Mapping[str, Any]:
    file = directory / _SETTINGS
    require(file.is_file(), f"{directory} is no adapter: it has no {_SETTINGS}")
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    require(kind == "LORA", f"{file}: peft_type={kind} is not supported, only LORA")
    for name in ("use_dora", "use_qalora", "lora_bias"):
        require(not settings.get(name), f"{file}: {name}={settings.get(name)} is not supported")
    require("lora_alpha" in settings, f"{file} lacks lora_alpha")
    return settings


def _adapter_file(directory: Path) -> Path:
    found = [directory / name for name in _FILES if (directory / name).is_file()]
    require(bool(found), f"{directory} lacks its tensors: neither {' nor '.join(_FILES)}")
    return found[0]


def _plain(name: str) -> str:
    """A tensor's name in the model itself."""
    return _WRAPPED.sub("", name.removeprefix(_PREFIX))


def _sort_names(
    factors: Tensors, settings: Mapping[str, Any], directory: Path
) -> tuple[dict[str, _Update], dict[str, str]]:
    """The updates by the name of what they change, and the whole parameters by name with their names in the file."""
    pairs: dict[str, dict[str, str]] = {}
    whole = {}
    for name in factors:
        factor = _FACTOR.fullmatch(_plain(name))
        if factor is None:
            whole[_plain(name)] = name
        else:
            pairs.setdefault(factor["module"], {})[factor["part"]] = name
    return {
        f"{module}.weight": _update(module, pair, factors, settings, directory) for module, pair in pairs.items()
    }, whole


def _update(
    module: str, pair: Mapping[str, str], factors: Tensors, settings: Mapping[str, Any], directory: Path
) -> _Update:
    embedding = any("embedding" in part for part in pair)
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    lacking = [part for part in (a, b) if part not in pair]
    require(not lacking, f"{directory} lacks {', '.join(lacking)} of {module}")
    alpha = settings["lora_alpha"]
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        alpha = value if re.match(rf"(.*\.)?({pattern})$", module) else alpha
    rank = factors.shapes[pair[a]][0]
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return _Update(pair[a], pair[b], scale, embedding or bool(settings.get("fan_in_fan_out")))


def _require_saved(settings: Mapping[str, Any], whole: Mapping[str, Any], directory: Path) -> None:
    for module in settings.get("modules_to_save") or ():
        found = any(f".{module}." in f".{name}" for name in whole)
        require(found, f"{directory} lacks {module}, which its modules_to_save names")
