"""LoRA adapters of PEFT, merged into the tensors of the model that they were trained on."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from lin_jax.convert.checkpoint_files import CheckpointFiles
from lin_jax.convert.tensors import Index, Tensors
from lin_jax.settings.base import require
from lin_jax.settings.foreign import read_object
from lin_jax.settings.typed import shown

Number = TypeVar("Number", int, float)

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
_STARTS: tuple[bool | str | None, ...] = (None, True, False, "gaussian", "eva", "orthogonal")
# Signs of repetition in a pattern of modules' names; each multiplies the time to try it by the length of a name.
_REPEATS = 3


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


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What an adapter_config.json tells that matters for the sum.

    Attributes:
        rank: of factors that no pattern names; None where it is not told.
        alpha: of updates that no pattern names.
        rank_pattern: other ranks, by regular expressions of modules' names.
        alpha_pattern: other alphas.
        by_root: whether alpha is divided by the root of the rank (rsLoRA).
        saved: modules that the file holds whole.
        ties: see `Adapted`.
    """

    rank: int | None
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    by_root: bool
    saved: tuple[str, ...]
    ties: bool


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
        self.ties = settings.ties
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


def _read_settings(directory: Path) -> _Settings:
    file = directory / _SETTINGS
    require(file.exists(), f"{directory} is no adapter: it has no {_SETTINGS}")
    fields = read_object(file)
    kind = fields.get("peft_type", str)
    fields.require(kind == "LORA", f"peft_type={kind} is not supported, only LORA")
    start = fields.get("init_lora_weights", bool | str, None)
    fields.require(
        start in _STARTS,
        f"init_lora_weights={start} is not supported: such an adapter belongs to a model that its start changed; let "
        "PEFT save it as plain LoRA, with path_initial_model_for_weight_conversion",
    )
    for name in fields:
        fields.require(
            name in _KNOWN or not fields.values[name], f"{name}={shown(fields.values[name])} is not supported"
        )
    ranks, alphas = fields.get("rank_pattern", dict[str, int], {}), fields.get("alpha_pattern", dict[str, float], {})
    for key in (*ranks, *alphas):
        fields.require(
            _is_plain_pattern(key), f"{key!r} is no pattern of a module's name, or may take for ever to match"
        )
    return _Settings(
        rank=fields.get("r", int, None),
        alpha=fields.get("lora_alpha", float),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        by_root=fields.get("use_rslora", bool, False),
        saved=tuple(fields.get("modules_to_save", list[str], [])),
        ties=fields.get("ensure_weight_tying", bool, False),
    )


def _is_plain_pattern(key: str) -> bool:
    """Whether a regular expression can be tried on a module's name in no time: it repeats no groups, and few things."""
    try:
        re.compile(key)
    except (re.error, OverflowError, RecursionError):
        return False
    return re.search(r"\)[*+{]", key) is None and len(re.findall(r"[*+{]", key)) <= _REPEATS


def _adapter_file(directory: Path) -> Path:
    found = [directory / name for name in _FILES if (directory / name).is_file()]
    require(bool(found), f"{directory} lacks its tensors: neither {' nor '.join(_FILES)}")
    return found[0]


def _plain(name: str) -> str:
    """A tensor's name in the model itself."""
    return _WRAPPED.sub("", name.removeprefix(_PREFIX))


def _sort_names(
    factors: Tensors, settings: _Settings, directory: Path, conv1d: tuple[str, ...]
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
        fits = len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][0] == shapes[1][1] > 0
        told = [f"{pair[part]} of shape {shape}" for part, shape in zip((a, b), shapes, strict=True)]
        require(fits, f"{directory}: {' and '.join(told)} are no factors of a matrix")
        scale = _scale(module, shapes[0][0], settings, directory)
        updates[f"{module}.weight"] = _Update(pair[a], pair[b], scale, embedding or module.endswith(conv1d))
    return updates, whole


def _scale(module: str, rank: int, settings: _Settings, directory: Path) -> float:
    """The factor of a module's update, as PEFT has it."""
    expected = _of_pattern(settings.rank_pattern, module, rank if settings.rank is None else settings.rank)
    require(rank == expected, f"{directory}: the factors of {module} have rank {rank}, but its settings say {expected}")
    alpha = _of_pattern(settings.alpha_pattern, module, settings.alpha)
    return alpha / (math.sqrt(rank) if settings.by_root else rank)


def _of_pattern(patterns: Mapping[str, Number], module: str, otherwise: Number) -> Number:
    """The value of the first pattern that matches the end of a module's name (PEFT's get_pattern_key)."""
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, otherwise)


def _require_saved(settings: _Settings, whole: Collection[str], directory: Path) -> None:
    for module in settings.saved:
        found = any(f".{module}." in f".{name}" for name in whole)
        require(found, f"{directory} lacks {module}, which its modules_to_save names")
