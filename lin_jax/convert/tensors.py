"""Arrays of another code by name: read from somewhere when they are asked for, whole or in part, or to be written."""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from lin_jax.settings.base import require

# Bytes of a tensor that are in memory at a time while it is written.
CHUNK_BYTES = 1 << 26

Index = tuple[slice, ...]


class Tensors(Mapping[str, np.ndarray], abc.ABC):
    """Arrays by name, each made when it is asked for and not kept.

    Attributes:
        shapes: the shape of every array.
        types: the name of its type, as `numpy.dtype` takes it where it is one of a model's parameters.
    """

    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        """Whether there is such an array; a mapping's own way would read it."""
        return name in self.shapes

    def part(self, name: str, index: Index) -> np.ndarray:
        """A part of an array, one slice a dimension; a file that can be read in parts reads no more than that."""
        return self[name][index]


class Held(Tensors):
    """Arrays that are in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        """Tensors with the names of `arrays`."""
        self._arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self.shapes = {name: array.shape for name, array in self._arrays.items()}
        self.types = {name: array.dtype.name for name, array in self._arrays.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]


class Renamed(Tensors):
    """Tensors under other names.

    Args:
        tensors: under theirs.
        names: new name -> theirs.
    """

    def __init__(self, tensors: Tensors, names: Mapping[str, str]):
        self._tensors, self._names = tensors, names
        self.shapes = {name: tensors.shapes[old] for name, old in names.items()}
        self.types = {name: tensors.types[old] for name, old in names.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._names[name]]

    def part(self, name: str, index: Index) -> np.ndarray:
        """The same part under the other name."""
        return self._tensors.part(self._names[name], index)


def listed(names: Sequence[str]) -> str:
    """Return the first of many names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def are_equal(tensors: Tensors, one: str, other: str) -> bool:
    """Return whether two tensors hold the same numbers, reading not much more than `CHUNK_BYTES` at a time."""
    shape = tensors.shapes[one]
    if shape != tensors.shapes[other] or not shape:
        return False
    rows = max(1, CHUNK_BYTES // max(1, 4 * math.prod(shape[1:])))
    rest = (slice(None),) * (len(shape) - 1)
    parts = ((slice(start, min(start + rows, shape[0])), *rest) for start in range(0, shape[0], rows))
    return all(np.array_equal(tensors.part(one, part), tensors.part(other, part)) for part in parts)


def require_finite(name: str, array: np.ndarray) -> None:
    """Raise `ConfigError` for a tensor that holds what is no number in its type."""
    wrong = array.size - int(np.count_nonzero(np.isfinite(array)))
    require(wrong == 0, f"{name}: {wrong} of {array.size} numbers are NaN or infinite in {array.dtype}")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array under the other code's name that is made when it is needed.

    Attributes:
        name: of the array.
        shape: of it.
        dtype: of it.
        make: makes it whole.
        rows: makes its rows from one number up to another; None where it can only be made whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]
    rows: Callable[[int, int], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """Its bytes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks(self) -> Iterator[np.ndarray]:
        """Its rows in order, not much more than `CHUNK_BYTES` of them at a time."""
        if self.rows is None or self.nbytes <= CHUNK_BYTES:
            yield self.make()
            return
        step = max(1, CHUNK_BYTES * self.shape[0] // self.nbytes)
        for start in range(0, self.shape[0], step):
            yield self.rows(start, min(start + step, self.shape[0]))
