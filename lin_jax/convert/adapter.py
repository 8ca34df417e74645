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
# Settings that change nothing of what is merged, which the tensors tell, or that are read here. All others are refused
# unless they are off: a method that this program does not know would be merged as plain LoRA.
_KNOWN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "lora_dropout", "r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "bias", "modules_to_save", "ensure_weight_tying", "init_lora_weights", "eva_config"),
    # Which modules have factors: those that are in the file.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    # PEFT goes by the kind of a module.
    "fan_in_fan_out",
    # Of methods that other settings turn on.
    *("megatron_core", "qalora_group_size"),
}
# Ways to start that leave the model as it was. PiSSA, OLoRA and others take away from it what the factors start with.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class _Update:
    """What is added to a tensor: scale * B A, transposed for embeddings and for Conv1D.

    Attributes:
        a: name of the factor [rank, inputs].
        b: name of the factor [outputs, rank].
        scale: of their product.
        transposed: whether the tensor is [inputs, outputs].
    """

    a: str
    b: str
    scale: float
    transposed: bool


class Adapted(Tensors):
    """The tensors of a model with an adapter merged into them, computed in float32.

    A tensor that the adapter holds whole takes the place of the model's; one that the model lacks is added. Those with
    an update keep the model's type. An adapter of embeddings also holds what it was trained on, `base_layer`, to which
    its update is added.

    Attributes:
        changed: names of the tensors that the adapter holds or updates.
        ties: whether what it does to the embedding it does to a head that shares its matrix, and the other way round.

    Args:
        base: the model, under Hugging Face's names.
        directory: `adapter_config.json`, `adapter_model.safetensors` or `.bin`, and maybe `trainable_params.bin`.
        conv1d: ends of the names of modules whose matrices are [inputs, outputs].

    Raises:
        ConfigError: a file is missing or damaged, the kind of adapter is unknown, or it does not fit the model.
    """

    def __init__(self, base: Tensors, directory: Path, conv1d: tuple[str, ...] = ()):
        self._base, self._directory = base, directory
        settings = _read_settings(directory)
        self.ties = bool(settings.get("ensure_weight_tying"))
        self._factors = CheckpointFiles(_adapter_file(directory))
        self._updates, whole = _sort_names(self._factors, settings, directory, conv1d)
        self._whole = {name: (self._factors, old) for name, old in whole.items()}
        self._add_whole_parameters()
        _require_saved(settings, self._whole, directory)
        self.changed = frozenset(self._updates) | frozenset(self._whole)
        self.shapes, self.types = dict(base.shapes), dict(base.types)
        for name, (tensors, old) in self._whole.items():
            self._require_shape(name, tensors.shapes[old])
            self.shapes[name], self.types[name] = tensors.shapes[old], tensors.types[old]
        for name in self._updates:
            self._require_update_fits(name)

    def __getitem__(self, name: str) -> np.ndarray:
        tensors, old = self._whole.get(name, (self._base, name))
        array, everything = tensors[old], (slice(None), slice(None))
        return array if name not in self._updates else self._merge(array, self._updates[name], everything)

    def part(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor, with that part of its update."""
        tensors, old = self._whole.get(name, (self._base, name))
        array = tensors.part(old, index)
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
        trained_on = name not in self._whole or ".base_layer." in self._whole[name][1]
        require(trained_on, f"{where} holds {name} both whole and as an update")
        a, b = (self._factors.shapes[factor] for factor in (update.a, update.b))
        self._require_shape(name, (a[1], b[0]) if update.transposed else (b[0], a[1]))


def _read_settings(directory: Path) -> Mapping[str, Any]:
    file = directory / _SETTINGS
    require(file.is_file(), f"{directory} is no adapter: it has no {_SETTINGS}")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    require(kind == "LORA", f"{file}: peft_type={kind} is not supported, only LORA")
    require("lora_alpha" in settings, f"{file} lacks lora_alpha")
    start = settings.get("init_lora_weights")
    require(
        start in _STARTS,
        f"{file}: init_lora_weights={start} is not supported: such an adapter belongs to a model that its start "
        "changed; let PEFT save it as plain LoRA, with path_initial_model_for_weight_conversion",
    )
    for name, value in settings.items():
        require(name in _KNOWN or not value, f"{file}: {name}={value!r:.80} is not supported")
    return settings


def _adapter_file(directory: Path) -> Path:
    found = [directory / name for name in _FILES if (directory / name).is_file()]
    require(bool(found), f"{directory} lacks its tensors: neither {' nor '.join(_FILES)}")
    return found[0]


def _plain(name: str) -> str:
    """A tensor's name in the model itself."""
    return _WRAPPED.sub("", name.removeprefix(_PREFIX))


def _sort_names(
    factors: Tensors, settings: Mapping[str, Any], directory: Path, conv1d: tuple[str, ...]
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
    updates = {}
    for module, pair in pairs.items():
        embedding = any("embedding" in part for part in pair)
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        lacking = [part for part in (a, b) if part not in pair]
        require(not lacking, f"{directory} lacks {', '.join(lacking)} of {module}")
        shapes = [factors.shapes[pair[part]] for part in (a, b)]
        fits = len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][0] == shapes[1][1]
        told = [f"{pair[part]} of shape {shape}" for part, shape in zip((a, b), shapes, strict=True)]
        require(fits, f"{directory}: {' and '.join(told)} are no factors of a matrix")
        scale = _scale(module, shapes[0][0], settings, directory)
        updates[f"{module}.weight"] = _Update(pair[a], pair[b], scale, embedding or module.endswith(conv1d))
    return updates, whole


def _scale(module: str, rank: int, settings: Mapping[str, Any], directory: Path) -> float:
    """The factor of a module's update, as PEFT has it."""
    expected = _of_pattern(settings.get("rank_pattern"), module, settings.get("r", rank))
    require(rank == expected, f"{directory}: the factors of {module} have rank {rank}, but its settings say {expected}")
    alpha = _of_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name (PEFT's get_pattern_key)."""
    matching = (key for key in patterns or () if re.match(rf"(.*\.)?({key})$", module))
    key = next(matching, None)
    return otherwise if key is None else (patterns or {})[key]


def _require_saved(settings: Mapping[str, Any], whole: Mapping[str, Any], directory: Path) -> None:
    for module in settings.get("modules_to_save") or ():
        found = any(f".{module}." in f".{name}" for name in whole)
        require(found, f"{directory} lacks {module}, which its modules_to_save names")
