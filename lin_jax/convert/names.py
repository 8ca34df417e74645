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

from lin_jax.convert.tensors import Held, Index, Tensor, Tensors, listed, require_finite
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.settings.base import ConfigError, require


def _same(x: Any) -> Any:
    return x


def _reversed(index: Index) -> Index:
    return index[::-1]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
        theirs: name in the other code; `{layer}` stands for a layer's number.
        ours: path of our parameter, joined by dots; one with `{layer}` in `theirs` is stacked over layers.
        to_ours: their array to ours, for one layer.
        to_theirs: the inverse.
        their_index: which part of their array holds a part of ours for one layer, and the other way round; None where
            only the whole does.
        depth: layers over which it is stacked, where the model has several stacks; None: those of the model.
    """

    theirs: str
    ours: str
    to_ours: Callable[[np.ndarray], np.ndarray] = _same
    to_theirs: Callable[[np.ndarray], np.ndarray] = _same
    their_index: Callable[[Index], Index] | None = _same
    depth: int | None = None


def transposed(theirs: str, ours: str) -> Entry:
    """A PyTorch linear weight [outputs, inputs], ours [inputs, outputs]."""
    return Entry(theirs, ours, np.transpose, np.transpose, _reversed)


def centred_filter(theirs: str, ours: str, taps: int) -> Entry:
    """Their centred filter [H, 1, 2 W - 1, 1], of which only the first W taps act, and our causal one [W, H].

    Our tap j, which multiplies the value j tokens back, is their tap W - 1 - j.
    """
    kernel = 2 * taps - 1

    def to_theirs(ours: np.ndarray) -> np.ndarray:
        return np.pad(ours[::-1], ((0, kernel - taps), (0, 0))).T[:, None, :, None]

    return Entry(theirs, ours, lambda x: x.reshape(-1, kernel)[:, :taps][:, ::-1].T, to_theirs, None)


def full_filter(theirs: str, ours: str) -> Entry:
    """Their filter [H, 1, K, 1] of a bidirectional convolution, of which all taps act, and ours [K, H].

    Our tap 0 multiplies the token that is furthest ahead, and their last one does.
    """
    return Entry(theirs, ours, lambda x: x[:, 0, ::-1, 0].T, lambda x: x[::-1].T[:, None, :, None], None)


def scalar(theirs: str, ours: str) -> Entry:
    """Their one number, of shape [1], ours of shape []."""
    return Entry(theirs, ours, lambda x: x.reshape(()), lambda x: x.reshape(1), None)


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
            which = entry, array, layer if stacked else None
            rows = functools.partial(_their_rows, *which) if entry.their_index is not None and len(shape) == 2 else None
            yield Tensor(name, shape, np.dtype(array.dtype), functools.partial(_their_array, *which), rows)


def _their_array(entry: Entry, array: Array, layer: int | None) -> np.ndarray:
    return entry.to_theirs(np.asarray(array if layer is None else array[layer]))


def _their_rows(entry: Entry, array: Array, layer: int | None, start: int, stop: int) -> np.ndarray:
    """Some rows of their array, the only ones that are brought to the host."""
    assert entry.their_index is not None
    index = entry.their_index((slice(start, stop), slice(None)))
    ranges = [range(*part.indices(size)) for part, size in zip(index, array.shape[-2:], strict=True)]
    begins, sizes = [part.start for part in ranges], [len(part) for part in ranges]
    if layer is not None:
        begins, sizes = [layer, *begins], [1, *sizes]
    # One program for all rows and layers, which static slices would not be.
    found = np.asarray(jax.lax.dynamic_slice(array, begins, sizes))
    return entry.to_theirs(found if layer is None else found[0])


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
    tensors = theirs if isinstance(theirs, Tensors) else Held(theirs)
    return {entry.ours: _to_ours(entry, tensors, depth, ours[entry.ours]) for entry in ordered}


def unused_names(table: list[Entry], theirs: Collection[str], depth: int) -> list[str]:
    """The names in `theirs` that no entry reads."""
    wanted = {name for entry in table for name in names_of(entry, depth)}
    return sorted(set(theirs) - wanted)


def _check_names(
    ours: Collection[str], table: list[Entry], theirs: Collection[str], depth: int, ignore: tuple[str, ...]
) -> None:
    wanted = {name for entry in table for name in names_of(entry, depth)}
    missing = sorted(wanted - set(theirs))
    require(not missing, f"the checkpoint lacks {listed(missing)}")
    unused = [name for name in unused_names(table, theirs, depth) if not name.endswith(ignore)]
    require(not unused, f"the model has no place for {listed(unused)}")
    unset = sorted(set(ours) - {entry.ours for entry in table})
    require(not unset, f"no entry of the table sets {', '.join(unset)}")


def _to_ours(entry: Entry, theirs: Tensors, depth: int, like: Any) -> Array:
    """Our array of one entry, where it is to lie; stacked layers are written into their place one after another."""
    where = like.sharding if isinstance(like, jax.ShapeDtypeStruct) else None
    names = names_of(entry, depth)
    if "{layer}" not in entry.theirs:
        return _one_to_ours(entry, names[0], theirs, like, where)
    one = jax.ShapeDtypeStruct(like.shape[1:], like.dtype)
    stack = jnp.zeros(like.shape, like.dtype, device=where)
    of_layer = None if where is None else NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
    for layer, name in enumerate(names):
        array = _one_to_ours(entry, name, theirs, one, of_layer)
        stack = jax.block_until_ready(_set_layer(stack, array, layer, where))
    return stack


def _one_to_ours(entry: Entry, name: str, theirs: Tensors, like: Any, where: Any) -> Array:
    """Our array of their array `name`, of which each device's part is read apart from the others."""
    _require_fits(entry, name, theirs.shapes[name], like.shape)

    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        with np.errstate(over="ignore", invalid="ignore"):  # It is said in another way.
            if entry.their_index is None:
                found = entry.to_ours(theirs[name])[index]
            else:
                found = entry.to_ours(theirs.part(name, entry.their_index(index)))
            found = np.asarray(found).astype(like.dtype, copy=False)
            if not np.isfinite(found).all():
                require_finite(name, theirs[name].astype(like.dtype))  # All of it, to tell how many there are.
        return found

    if where is None:
        return jax.device_put(part((slice(None),) * len(like.shape)))
    return jax.make_array_from_callback(like.shape, where, part)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _set_layer(stack: Array, array: Array, layer: Array, where: NamedSharding | None) -> Array:
    stack = jax.lax.dynamic_update_index_in_dim(stack, array, layer, 0)
    return stack if where is None else jax.lax.with_sharding_constraint(stack, where)


def _require_fits(entry: Entry, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise `ConfigError` unless their array becomes ours of the expected shape."""
    problem = f"{name} has shape {found}, which does not fit {entry.ours}{expected}"
    try:
        shape = entry.to_ours(np.broadcast_to(np.zeros((), np.int8), found)).shape
    except ValueError:  # a reshape that cannot be
        raise ConfigError(problem) from None
    require(shape == expected, problem)


def names_of(entry: Entry, depth: int) -> list[str]:
    """The other code's names that an entry reads, one a layer."""
    if "{layer}" not in entry.theirs:
        return [entry.theirs]
    return [entry.theirs.format(layer=layer) for layer in range(depth if entry.depth is None else entry.depth)]


def _assign(model: nnx.Module, path: str, value: Array) -> None:
    target: Any = model
    for name in path.split("."):
        target = getattr(target, name)
    target.set_value(jnp.asarray(value))
