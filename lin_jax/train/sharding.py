"""Which device holds what: the mesh, and one table from logical axes to its axes.

A parameter says by its metadata `axes` what its dimensions mean ("width", "vocabulary", ...); `MESH_AXES` says along
which axis of the mesh such a dimension is cut. A new kind of parallelism is a new field of `MeshConfig` and an entry
here; models and the training step stay as they are.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lin_jax.config import MeshConfig, require

# Logical axis -> mesh axes that cut it, in order.
MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "width": ("fsdp",),
    "hidden": (),
    "query_key": (),
    "vocabulary": (),
    "heads": (),
    "feed_forward": (),
    "positions": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration, over all devices unless some are given.

    Raises:
        ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    told = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    require(
        len(devices) % fixed == 0 and (-1 in sizes.values() or fixed == len(devices)),
        f"{told} does not fit {len(devices)} devices; set one of them to -1 to take what is left",
    )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Parts into which the rows of a batch are cut."""
    return int(np.prod([mesh.shape[axis] for axis in MESH_AXES["batch"]]))


def check_batch(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Raise `ConfigError` unless every device gets the same number of rows of every microbatch."""
    shards = batch_shards(mesh)
    require(
        batch_size % (shards * microbatches) == 0,
        f"data.batch_size={batch_size} is not divisible by train.microbatches={microbatches} times "
        f"{shards} devices that share a batch",
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over every axis that shares it."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """How a parameter is cut.

    Args:
        mesh: the devices.
        axes: logical names of the last dimensions; a leading dimension without a name (stacked layers) is not cut.
        shape: of the parameter. A dimension that the mesh does not divide is not cut.
    """
    names = (None,) * (len(shape) - len(axes)) + tuple(axes)
    used: set[str] = set()
    return NamedSharding(mesh, PartitionSpec(*(_cut(mesh, n, s, used) for n, s in zip(names, shape, strict=True))))


def _cut(mesh: Mesh, name: str | None, size: int, used: set[str]) -> tuple[str, ...] | None:
    """Mesh axes for one dimension; a mesh axis cuts only one dimension of an array."""
    axes = () if name is None else MESH_AXES[name]
    shards = int(np.prod([mesh.shape[axis] for axis in axes]))
    if shards == 1 or size % shards or used.intersection(axes):
        return None
    used.update(axes)
    return axes


def global_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows of a batch, [b, T] each, as parts of arrays over all devices of all processes."""
    return {key: jax.make_array_from_process_local_data(sharding, rows) for key, rows in batch.items()}


def show_sharding(shapes: Any, shardings: Any) -> str:
    """A table of every parameter: name, shape, type, how it is cut, bytes on a device."""
    rows, total = [], 0
    for (path, shape), sharding in zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True):
        size = int(np.prod(sharding.shard_shape(shape.shape))) * shape.dtype.itemsize
        total += size
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rows.append((name, str(list(shape.shape)), str(shape.dtype), _spec(sharding), f"{size:,}"))
    rows = [("parameter", "shape", "type", "cut along", "bytes a device"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"{total:,} bytes of parameters on each device"])


def _spec(sharding: NamedSharding) -> str:
    names = ["x".join((part,) if isinstance(part, str) else part) if part else "-" for part in sharding.spec]
    return ", ".join(names) if any(name != "-" for name in names) else "whole"
