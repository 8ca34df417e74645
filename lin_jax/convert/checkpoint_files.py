"""Files of tensors in a directory: safetensors, one or several; PyTorch's .bin where torch is installed."""

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lin_jax.convert.tensors import Index, Tensor, Tensors, listed
from lin_jax.settings.base import ConfigError, require
from lin_jax.settings.foreign import read_object

# Bytes after which a file of tensors is closed and the next one begun.
SHARD_BYTES = 4 << 30
# In the order in which transformers looks for them: a file before an index, safetensors before PyTorch's.
_PLACES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_PYTORCH = (".bin", ".pt", ".pth")
# Names of types in safetensors; other types are no model's parameters.
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOATS = tuple(_TYPES.values())
_SHORT = {name: short for short, name in _TYPES.items()}


class CheckpointFiles(Tensors):
    """The tensors of a checkpoint.

    Args:
        path: a file, or a directory with `model.safetensors` or `pytorch_model.bin`, or the shards that their index
            names. Where there are several, the one that transformers reads: a whole file before an index, which may
            have been left behind.

    Raises:
        ConfigError: a file is missing, damaged, or holds other things than tensors; pickles are never executed.
    """

    def __init__(self, path: Path):
        self._files = dict(_locate(path))
        self._torch: tuple[Path, Mapping[str, Any]] | None = None
        self.shapes, self.types = {}, {}
        for file in sorted(set(self._files.values())):
            for name, shape, kind in self._describe(file):
                self.shapes[name], self.types[name] = shape, kind
        missing = sorted(self._files.keys() - self.shapes.keys())
        require(not missing, f"{path}: its index names {listed(missing)}, which its files do not hold")

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._files[name]
        if file.suffix in _PYTORCH:
            return _from_torch(self._load_torch(file)[name])
        with _open(file) as tensors:
            return tensors.get_tensor(name)

    def part(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor, of which no more than that is read."""
        file = self._files[name]
        if file.suffix in _PYTORCH:
            return _from_torch(self._load_torch(file)[name][index])
        with _open(file) as tensors:
            return tensors.get_slice(name)[index]

    def _describe(self, file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Names, shapes and types of what a file holds of the names that are looked for in it."""
        if file.suffix in _PYTORCH:
            for name, tensor in self._load_torch(file).items():
                if self._files.get(name) == file:
                    yield name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            return
        with _open(file) as tensors:
            for name in list(tensors.keys()):
                if self._files.get(name) == file:
                    part = tensors.get_slice(name)
                    yield name, tuple(part.get_shape()), _TYPES.get(part.get_dtype(), part.get_dtype())

    def _load_torch(self, file: Path) -> Mapping[str, Any]:
        """One file at a time stays open."""
        if self._torch is None or self._torch[0] != file:
            self._torch = file, _load_torch(file)
        return self._torch[1]


def _locate(directory: Path) -> Iterator[tuple[str, Path]]:
    """The name of every tensor and the file that holds it."""
    if directory.is_file():
        yield from ((name, directory) for name in _names(directory))
        return
    place = next((directory / name for name in _PLACES if (directory / name).is_file()), None)
    if place is None:
        raise ConfigError(f"{directory} holds no tensors: neither {' nor '.join(_PLACES)}")
    if place.suffix == ".json":
        yield from _read_index(place)
    else:
        yield from ((name, place) for name in _names(place))


def _read_index(index: Path) -> Iterator[tuple[str, Path]]:
    where = read_object(index).get("weight_map", dict[str, str])
    directory = index.parent
    for file in sorted(set(where.values())):
        _require_inside(index, file)
    absent = sorted({file for file in where.values() if not (directory / file).is_file()})
    require(not absent, f"{directory} lacks {listed(absent)}, which {index.name} names")
    held = {name for file in set(where.values()) for name in _names(directory / file)}
    unnamed = sorted(held - where.keys())
    require(not unnamed, f"{index} does not name {listed(unnamed)}, which its files hold: it is of another model")
    yield from ((name, directory / file) for name, file in where.items())


def _require_inside(index: Path, file: str) -> None:
    """Raise `ConfigError` for a file that does not lie in the index's directory, by its name or through a link.

    In the cache of the Hub, `snapshots/REVISION/FILE` is a link to `blobs/HASH`, which is no way out.
    """
    directory = index.parent.resolve()
    place = (directory / file).resolve()
    homes = [directory]
    if directory.parent.name == "snapshots":
        homes.append(directory.parent.parent / "blobs")
    inside = (
        not Path(file).is_absolute() and ".." not in Path(file).parts and any(place.is_relative_to(x) for x in homes)
    )
    require(inside, f"{index} names {file!r}, which leads out of its directory: put the file beside it")


def _names(file: Path) -> list[str]:
    if file.suffix in _PYTORCH:
        return list(_load_torch(file))
    with _open(file) as tensors:
        return list(tensors.keys())


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "np", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is not a file of safetensors, or is cut short: {error}") from error


def _load_torch(file: Path) -> Mapping[str, Any]:
    """The tensors of a PyTorch file; anything else in its pickle is refused by torch and never executed."""
    try:
        import torch
    except ImportError:
        raise ConfigError(f"{file} needs PyTorch to be read: pip install torch, or get its safetensors") from None
    try:
        with warnings.catch_warnings(action="ignore"):
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        return {name: tensor.detach() for name, tensor in tensors.items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ValueError) as error:
        first = re.split(r"\n|\. ", str(error).strip())[0]  # What follows tells how to execute it.
        raise ConfigError(f"{file} is not a file of tensors alone, and nothing in it was executed: {first}") from error


def _from_torch(tensor: Any) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of one file, safetensors or PyTorch's; raises `ConfigError` where it is damaged."""
    if file.suffix != ".safetensors":
        return {name: _from_torch(tensor) for name, tensor in _load_torch(file).items()}
    with _open(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def write_tensors(directory: Path, tensors: Sequence[Tensor]) -> None:
    """Write safetensors, one tensor at a time, in several files with an index where they exceed `SHARD_BYTES`."""
    shards = _shards(tensors)
    if len(shards) == 1:
        _write_shard(directory / _PLACES[0], shards[0])
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(directory / file, shard)
        where |= dict.fromkeys((tensor.name for tensor in shard), file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": where}
    (directory / _PLACES[1]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _write_shard(file: Path, shard: Sequence[Tensor]) -> None:
    """Write one file: the length of its head, the head as JSON, the bytes of all tensors (safetensors' README).

    The library writes the same, but wants all of a file's tensors in memory at once.
    """
    head, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in shard:
        begin, end = end, end + tensor.nbytes
        entry = {"dtype": _SHORT[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [begin, end]}
        head[tensor.name] = entry  # type: ignore[assignment]
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in shard:
            for chunk in tensor.chunks():
                out.write(np.ascontiguousarray(chunk, dtype=tensor.dtype).reshape(-1).view(np.uint8).data)
