"""Files of tensors in a directory: safetensors, one or several; PyTorch's .bin where torch is installed."""

import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lin_jax.config import ConfigError, require

# Bytes after which a file of tensors is closed and the next one begun.
SHARD_BYTES = 4 << 30
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEXES = tuple(f"{name}.index.json" for name in _SINGLE)


class CheckpointFiles(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint by name, each read when it is asked for and not kept.

    Args:
        directory: holds `model.safetensors` or `pytorch_model.bin`, or the shards that their index names.

    Raises:
        ConfigError: a file is missing, damaged, or holds other things than tensors; pickles are never executed.
    """

    def __init__(self, directory: Path):
        self._files = dict(_locate(directory))
        self._torch: tuple[Path, Mapping[str, Any]] | None = None
        self.shapes = {name: shape for file in sorted(set(self._files.values())) for name, shape in self._shapes(file)}
        missing = sorted(self._files.keys() - self.shapes.keys())
        require(not missing, f"{directory}: its index names {', '.join(missing[:3])}, which its files do not hold")

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._files[name]
        if file.suffix == ".bin":
            return _from_torch(self._load_torch(file)[name])
        with _open(file) as tensors:
            return tensors.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _shapes(self, file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        """What a file holds of the names that are looked for in it."""
        if file.suffix == ".bin":
            yield from ((n, tuple(t.shape)) for n, t in self._load_torch(file).items() if self._files.get(n) == file)
            return
        with _open(file) as tensors:
            for name in list(tensors.keys()):
                if self._files.get(name) == file:
                    yield name, tuple(tensors.get_slice(name).get_shape())

    def _load_torch(self, file: Path) -> Mapping[str, Any]:
        """One file at a time stays open."""
        if self._torch is None or self._torch[0] != file:
            self._torch = file, _load_torch(file)
        return self._torch[1]


def _locate(directory: Path) -> Iterator[tuple[str, Path]]:
    """The name of every tensor and the file that holds it."""
    for single, index in zip(_SINGLE, _INDEXES, strict=True):
        if (directory / index).is_file():
            yield from _read_index(directory, index)
            return
        if (directory / single).is_file():
            file = directory / single
            yield from ((name, file) for name in _names(file))
            return
    raise ConfigError(f"{directory} holds no tensors: neither {' nor '.join((*_SINGLE, *_INDEXES))}")


def _read_index(directory: Path, index: str) -> Iterator[tuple[str, Path]]:
    try:
        where = json.loads((directory / index).read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{directory / index} is not an index of tensors: {error}") from error
    absent = sorted({file for file in where.values() if not (directory / file).is_file()})
    require(not absent, f"{directory} lacks {', '.join(absent[:3])}, which {index} names")
    yield from ((name, directory / file) for name, file in where.items())


def _names(file: Path) -> list[str]:
    if file.suffix == ".bin":
        return list(_load_torch(file))
    with _open(file) as tensors:
        return list(tensors.keys())


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is not a file of safetensors, or is cut short: {error}") from error


def _load_torch(file: Path) -> Mapping[str, Any]:
    """The tensors of a .bin file; anything else in its pickle is refused by torch and never executed."""
    try:
        import torch
    except ImportError:
        raise ConfigError(f"{file} needs PyTorch to be read: pip install torch, or get its safetensors") from None
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        return {name: tensor.detach() for name, tensor in tensors.items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
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


def write_tensors(directory: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write safetensors, in several files with an index where they exceed `SHARD_BYTES`."""
    where: dict[str, int] = {}
    files, total = 0, 0
    shard: dict[str, np.ndarray] = {}
    for name, array in tensors:
        if shard and sum(x.nbytes for x in shard.values()) + array.nbytes > SHARD_BYTES:
            files, shard = _write_shard(directory, files, shard), {}
        shard[name], where[name] = np.ascontiguousarray(array).reshape(array.shape), files
        total += array.nbytes
    files = _write_shard(directory, files, shard)
    if files == 1:
        (directory / _part(0)).rename(directory / _SINGLE[0])
        return
    names = [f"model-{number + 1:05}-of-{files:05}.safetensors" for number in range(files)]
    for number, name in enumerate(names):
        (directory / _part(number)).rename(directory / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[n] for name, n in where.items()}}
    (directory / _INDEXES[0]).write_text(json.dumps(index, indent=2) + "\n")


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _write_shard(directory: Path, number: int, shard: dict[str, np.ndarray]) -> int:
    """Write one file; returns the number of the next."""
    save_file(shard, directory / _part(number), metadata={"format": "pt"})
    return number + 1
