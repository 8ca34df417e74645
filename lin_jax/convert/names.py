"""Tables of names between another code's parameters and ours, with transformations that can be undone."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from lin_jax.config import ConfigError, require


def _same(x: np.ndarray) -> np.ndarray:
    return x


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
        theirs: name in the other code; `{layer}` stands for a layer's number.
        ours: path of our parameter, joined by dots; one with `{layer}` in `theirs` is stacked over layers.
        to_ours: their array to ours, for one layer.
        to_theirs: the inverse.
    """

    theirs: str
    ours: str
    to_ours: Callable[[np.ndarray], np.ndarray] = _same
    to_theirs: Callable[[np.ndarray], np.ndarray] = _same


def transposed(theirs: str, ours: str) -> Entry:
    """A PyTorch linear weight [outputs, inputs], ours [inputs, outputs]."""
    return Entry(theirs, ours, np.transpose, np.transpose)


def parameters(model: nnx.Module) -> dict[str, Array]:
    """The trainable arrays of a model by path, joined by dots."""
    return _by_path(model)


def _by_path(model: nnx.Module) -> dict[str, Any]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def to_theirs(table: list[Entry], ours: Mapping[str, Array], depth: int) -> dict[str, np.ndarray]:
    """Our arrays (parameters, or gradients of the same paths) under the other code's names."""
    result = {}
    for entry in table:
        array = np.asarray(ours[entry.ours])
        if "{layer}" not in entry.theirs:
            result[entry.theirs] = entry.to_theirs(array)
            continue
        for layer in range(depth):
            result[entry.theirs.format(layer=layer)] = entry.to_theirs(array[layer])
    return result


def load(
    model: nnx.Module,
    table: list[Entry],
    theirs: Mapping[str, np.ndarray],
    depth: int,
    ignore: tuple[str, ...],
) -> None:
    """Sets every parameter of `model` from the other code's arrays; where one does not fit, sets none.

    Args:
        model: changed in place. It may be abstract, from `nnx.eval_shape`: then no parameter is made in vain.
        table: one entry for every parameter of the model.
        theirs: the other code's arrays by name.
        depth: layers.
        ignore: ends of names that hold no parameters.

    Raises:
        ConfigError: an array is missing, left over or of another shape, or the table leaves a parameter out.
    """
    wanted = {name for entry in table for name in _names(entry, depth)}
    missing = sorted(wanted - theirs.keys())
    require(not missing, f"the checkpoint lacks {', '.join(missing[:5])}" + _more(missing))
    unused = sorted(name for name in theirs.keys() - wanted if not name.endswith(ignore))
    require(not unused, f"the model has no place for {', '.join(unused[:5])}" + _more(unused))
    ours = _by_path(model)
    unset = sorted(ours.keys() - {entry.ours for entry in table})
    require(not unset, f"no entry of the table sets {', '.join(unset)}")
    arrays = {entry.ours: _to_ours(entry, theirs, depth, ours[entry.ours].shape) for entry in table}
    for path, array in arrays.items():
        _assign(model, path, array.astype(ours[path].dtype))


def _to_ours(entry: Entry, theirs: Mapping[str, np.ndarray], depth: int, shape: tuple[int, ...]) -> np.ndarray:
    """Our array of one entry, all layers of it."""
    arrays = []
    for name in _names(entry, depth):
        found, expected = np.asarray(theirs[name]), shape[1:] if "{layer}" in entry.theirs else shape
        try:
            arrays.append(entry.to_ours(found))
        except ValueError:  # a reshape that cannot be
            raise ConfigError(f"{name} has shape {found.shape}, which does not fit {entry.ours}{expected}") from None
        if arrays[-1].shape != expected:
            raise ConfigError(f"{name} has shape {found.shape}, which does not fit {entry.ours}{expected}")
    return np.stack(arrays) if "{layer}" in entry.theirs else arrays[0]


def _names(entry: Entry, depth: int) -> list[str]:
    if "{layer}" not in entry.theirs:
        return [entry.theirs]
    return [entry.theirs.format(layer=layer) for layer in range(depth)]


def _more(names: list[str]) -> str:
    return f" and {len(names) - 5} more" if len(names) > 5 else ""


def _assign(model: nnx.Module, path: str, value: np.ndarray) -> None:
    target = model
    for name in path.split("."):
        target = getattr(target, name)
    target.set_value(jnp.asarray(value))
