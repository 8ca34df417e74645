"""Tables of names between another code's parameters and ours, with transformations that can be undone."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from lin_jax.config import ConfigError, require
from lin_jax.layers.parameter import parameters_by_path


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


def centred_filter(theirs: str, ours: str, taps: int) -> Entry:
    """Their centred filter [H, 1, 2 W - 1, 1], of which only the first W taps act, and our causal one [W, H].

    Our tap j, which multiplies the value j tokens back, is their tap W - 1 - j.
    """
    kernel = 2 * taps - 1

    def to_theirs(ours: np.ndarray) -> np.ndarray:
        return np.pad(ours[::-1], ((0, kernel - taps), (0, 0))).T[:, None, :, None]

    return Entry(theirs, ours, lambda x: x.reshape(-1, kernel)[:, :taps][:, ::-1].T, to_theirs)


def scalar(theirs: str, ours: str) -> Entry:
    """Their one number, of shape [1], ours of shape []."""
    return Entry(theirs, ours, lambda x: x.reshape(()), lambda x: x.reshape(1))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array under the other code's name that is made when it is needed."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its bytes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def to_theirs(table: list[Entry], ours: Mapping[str, Array], depth: int) -> dict[str, np.ndarray]:
    """Our arrays (parameters, or gradients of the same paths) under the other code's names."""
    return {tensor.name: tensor.make() for tensor in tensors_of(table, ours, depth)}


def tensors_of(table: list[Entry], ours: Mapping[str, Array], depth: int) -> Iterator[Tensor]:
    """What `to_theirs` gives, each to be made when it is needed."""
    for entry in table:
        array, stacked = ours[entry.ours], "{layer}" in entry.theirs
        nothing = np.broadcast_to(np.zeros((), array.dtype), array.shape[1:] if stacked else array.shape)
        shape = entry.to_theirs(nothing).shape
        for layer, name in enumerate(names_of(entry, depth)):
            make = functools.partial(_their_array, entry, array, layer if stacked else None)
            yield Tensor(name, shape, np.dtype(array.dtype), make)


def _their_array(entry: Entry, array: Array, layer: int | None) -> np.ndarray:
    return entry.to_theirs(np.asarray(array if layer is None else array[layer]))


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
    ours = parameters_by_path(model)
    for path, array in read(ours, table, theirs, depth, ignore).items():
        _assign(model, path, array)


def read(
    ours: Mapping[str, Any],
    table: list[Entry],
    theirs: Mapping[str, np.ndarray],
    depth: int,
    ignore: tuple[str, ...],
) -> dict[str, Array]:
    """Our arrays of the other code's, which are asked for one at a time.

    Args:
        ours: an array, or its shape and type (and where it is to lie), for every parameter of the model.
        table: one entry for each of them.
        theirs: the other code's arrays by name; may read them from a file when they are asked for.
        depth: layers.
        ignore: ends of names that hold no parameters.

    Raises:
        ConfigError: an array is missing, left over or of another shape, or the table leaves a parameter out.
    """
    _check_names(ours.keys(), table, theirs.keys(), depth, ignore)
    size = {entry.ours: math.prod(ours[entry.ours].shape) // len(names_of(entry, depth)) for entry in table}
    # Large tensors first, while there is little else in memory.
    ordered = sorted(table, key=lambda entry: -size[entry.ours])
    return {entry.ours: _to_ours(entry, theirs, depth, ours[entry.ours]) for entry in ordered}


def unused_names(table: list[Entry], theirs: Collection[str], depth: int) -> list[str]:
    """The names in `theirs` that no entry reads."""
    wanted = {name for entry in table for name in names_of(entry, depth)}
    return sorted(set(theirs) - wanted)


def _check_names(
    ours: Collection[str], table: list[Entry], theirs: Collection[str], depth: int, ignore: tuple[str, ...]
) -> None:
    wanted = {name for entry in table for name in names_of(entry, depth)}
    missing = sorted(wanted - set(theirs))
    require(not missing, f"the checkpoint lacks {', '.join(missing[:5])}" + _more(missing))
    unused = [name for name in unused_names(table, theirs, depth) if not name.endswith(ignore)]
    require(not unused, f"the model has no place for {', '.join(unused[:5])}" + _more(unused))
    unset = sorted(set(ours) - {entry.ours for entry in table})
    require(not unset, f"no entry of the table sets {', '.join(unset)}")


def _to_ours(entry: Entry, theirs: Mapping[str, np.ndarray], depth: int, like: Any) -> Array:
    """Our array of one entry, where it is to lie; stacked layers are written into their place one after another."""
    where = like.sharding if isinstance(like, jax.ShapeDtypeStruct) else None
    if "{layer}" not in entry.theirs:
        return jax.device_put(_fitting(entry, entry.theirs, theirs, like.shape).astype(like.dtype, copy=False), where)
    stack = jnp.zeros(like.shape, like.dtype, device=where)
    of_layer = None if where is None else NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
    for layer, name in enumerate(names_of(entry, depth)):
        array = _fitting(entry, name, theirs, like.shape[1:]).astype(like.dtype, copy=False)
        stack = jax.block_until_ready(_set_layer(stack, jax.device_put(array, of_layer), layer, where))
    return stack


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _set_layer(stack: Array, array: Array, layer: Array, where: NamedSharding | None) -> Array:
    stack = jax.lax.dynamic_update_index_in_dim(stack, array, layer, 0)
    return stack if where is None else jax.lax.with_sharding_constraint(stack, where)


def _fitting(entry: Entry, name: str, theirs: Mapping[str, np.ndarray], expected: tuple[int, ...]) -> np.ndarray:
    """Their array `name` as ours; raises `ConfigError` unless it has the expected shape."""
    found = np.asarray(theirs[name])
    problem = f"{name} has shape {found.shape}, which does not fit {entry.ours}{expected}"
    try:
        array = entry.to_ours(found)
    except ValueError:  # a reshape that cannot be
        raise ConfigError(problem) from None
    require(array.shape == expected, problem)
    return array


def names_of(entry: Entry, depth: int) -> list[str]:
    """The other code's names that an entry reads, one a layer."""
    if "{layer}" not in entry.theirs:
        return [entry.theirs]
    return [entry.theirs.format(layer=layer) for layer in range(depth)]


def _more(names: list[str]) -> str:
    return f" and {len(names) - 5} more" if len(names) > 5 else ""


def _assign(model: nnx.Module, path: str, value: Array) -> None:
    target: Any = model
    for name in path.split("."):
        target = getattr(target, name)
    target.set_value(jnp.asarray(value))
