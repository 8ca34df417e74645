"""Which device holds what: the mesh, and one table from logical axes to its axes.

A parameter says by its metadata `axes` what its dimensions mean ("width", "vocabulary", ...), and layers name the
dimensions of their activations alike; `MESH_AXES` says along which axes of the mesh such a dimension is cut.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from lin_jax.attentions.registry import ATTENTIONS
from lin_jax.experiment import Config
from lin_jax.layers.partition import Partition, Rules
from lin_jax.models.base import ModelConfig
from lin_jax.models.registry import MODELS
from lin_jax.settings.base import require
from lin_jax.settings.mesh import MeshConfig
from lin_jax.tasks.base import BatchField

# Axes of the mesh, those first over which least is sent. Devices that lie next to each other share the last ones.
MESH = ("slice", "data", "fsdp", "sequence", "tensor")

# Logical axis -> mesh axes that cut it, in order. `mesh.rules` changes single lines.
MESH_AXES: dict[str, tuple[str, ...]] = {
    # of activations
    "batch": ("slice", "data", "fsdp"),  # rows
    "tokens": ("sequence",),  # of a row
    # of parameters and activations
    "heads": ("tensor",),  # query heads and key/value heads
    "feed_forward": ("tensor",),
    "hidden": ("tensor",),  # values and gate of FLASH
    "query_key": (),  # FLASH's one narrow head, which all devices need whole
    "vocabulary": ("tensor",),
    # of parameters; gathered over axes that cut activations before they are used
    "width": ("fsdp",),
    "positions": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration, over all devices unless some are given.

    It has the axes of several devices alone, or `data` of one: exchanges along an axis of one device do nothing, but
    some compilers keep them.

    Raises:
        ConfigError: the axes do not multiply to the number of devices, or `slice` is not that of the devices' slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in MESH}
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    told = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items() if size != 1) or "mesh.data=1"
    require(
        len(devices) % fixed == 0 and (-1 in sizes.values() or fixed == len(devices)),
        f"{told} does not fit {len(devices)} devices; set one of them to -1 to take what is left",
    )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
    laid_out = _lay_out(shape, devices)
    names = [name for name, size in zip(MESH, shape, strict=True) if size > 1] or ["data"]
    axis_types = (AxisType.Auto,) * len(names)
    return Mesh(laid_out.reshape([size for size in shape if size > 1] or [1]), names, axis_types=axis_types)


def _lay_out(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array: the first axis from slice to slice of TPUs, the others within a slice."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    tpu = devices[0].platform == "tpu"
    if len(slices) == 1 or (shape[0] == 1 and not tpu):  # GPUs call a host a slice.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=tpu)
    require(
        shape[0] == len(slices),
        f"mesh.slice={shape[0]}, but the {len(devices)} devices are in {len(slices)} slices: set it to {len(slices)}",
    )
    between = (shape[0],) + (1,) * (len(shape) - 1)
    return mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), between, devices, allow_split_physical_axes=tpu)


def make_partition(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Partition:
    """The mesh of a configuration and its rules.

    Raises:
        ConfigError: see `make_mesh`; or `mesh.rules` names an axis that does not exist.
    """
    return Partition(make_mesh(config, devices), make_rules(config.rules))


def default_partition(mesh: Mesh) -> Partition:
    """A mesh, with the rules as they are without settings."""
    return Partition(mesh, make_rules(()))


def make_rules(changes: Iterable[str]) -> Rules:
    """`MESH_AXES` with changes such as `width=fsdp+sequence` or, for an axis that is not cut, `vocabulary=`.

    Raises:
        ConfigError: a name that does not exist.
    """
    table = dict(MESH_AXES)
    for change in changes:
        name, _, axes = change.partition("=")
        table[name] = tuple(axis for axis in axes.split("+") if axis)
        _require_known("logical axis", name, MESH_AXES)
        for axis in table[name]:
            _require_known("mesh axis", axis, MESH)
    shared = set(table["batch"]) & set(table["tokens"])
    require(not shared, f"mesh.rules: batch and tokens cannot both be cut along {', '.join(sorted(shared))}")
    return tuple(table.items())


def _require_known(what: str, name: str, known: Iterable[str]) -> None:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    told = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
    require(name in known, f"mesh.rules: unknown {what} {name!r}{told}")


def batch_shards(partition: Partition) -> int:
    """Parts into which the rows of a batch are cut."""
    return partition.shards("batch")


def check_fit(config: Config, partition: Partition) -> None:
    """Raise `ConfigError` unless every device gets the same part of the batch, of the rows and of the model."""
    check_batch(partition, config.data.batch_size, config.train.microbatches)
    _check_model(partition, config.model)
    _check_tokens(partition, config.model, config.data.sequence_length)


def check_batch(partition: Partition, batch_size: int, microbatches: int) -> None:
    """Raise `ConfigError` unless every device gets the same number of rows of every microbatch."""
    shards = batch_shards(partition)
    require(
        batch_size % (shards * microbatches) == 0,
        f"data.batch_size={batch_size} is not divisible by train.microbatches={microbatches} times "
        f"{shards} devices that share a batch",
    )


def _check_model(partition: Partition, model: ModelConfig) -> None:
    """Raise `ConfigError` unless the mesh divides what it cuts, such as the heads."""
    for name, fields in MODELS[model.architecture].cut_sizes.items():
        shards = partition.shards(name)
        for field in fields:
            size = getattr(model, field)
            require(
                size % shards == 0,
                f"model.{field}={size} is not divisible by the {shards} devices of {_told(partition, name)}",
            )


def _check_tokens(partition: Partition, model: ModelConfig, length: int) -> None:
    """Rows are cut in whole groups, and what a shard sends on must lie in it."""
    shards, attention = partition.shards("tokens"), model.attention
    if shards == 1:
        return
    told = _told(partition, "tokens")
    architecture = model.architecture
    require(not MODELS[architecture].reads_source, f"{told} cuts rows, which {architecture} needs whole: leave it at 1")
    require(attention.causal, f"{told} cuts rows, which attention.causal=false needs whole")
    require(length % shards == 0, f"data.sequence_length={length} is not divisible by the {shards} devices of {told}")
    own = length // shards
    parts = f"data.sequence_length={length} over the {shards} devices of {told} is {own} tokens each"
    for kind in dict.fromkeys(attention.kinds(model.depth)):
        settings = attention if kind == attention.kind else ATTENTIONS[kind].settings(kind=kind)
        ATTENTIONS[kind].check_parts(settings, own, parts)


def _told(partition: Partition, name: str) -> str:
    """The mesh axes that cut a logical axis, with their sizes."""
    assert partition.mesh is not None
    return ", ".join(f"mesh.{axis}={partition.mesh.shape[axis]}" for axis in partition.axes(name))


def batch_sharding(partition: Partition) -> NamedSharding:
    """Rows of a batch over every axis that shares it, and their tokens."""
    return partition.place(partition.axes("batch"), partition.axes("tokens"))


def batch_shardings(partition: Partition, fields: Mapping[str, BatchField]) -> dict[str, NamedSharding]:
    """Return how the arrays of a batch lie."""
    return {name: partition.sharding(field.axes, field.shape) for name, field in fields.items()}


def replicated(partition: Partition) -> NamedSharding:
    """A whole copy on every device."""
    return partition.place()


def show_sharding(partition: Partition, shapes: Any, shardings: Any) -> str:
    """The mesh, what cuts each logical axis, and a table of every parameter: how it is cut, bytes on a device."""
    rows, total = [], 0
    for (path, shape), sharding in zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True):
        size = int(np.prod(sharding.shard_shape(shape.shape))) * shape.dtype.itemsize
        total += size
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rows.append((name, str(list(shape.shape)), str(shape.dtype), _spec(sharding), f"{size:,}"))
    rows = [("parameter", "shape", "type", "cut along", "bytes a device"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*_describe(partition), *lines, f"{total:,} bytes of parameters on each device"])


def _describe(partition: Partition) -> list[str]:
    """The mesh and the rules."""
    assert partition.mesh is not None
    sizes = [f"{axis} {size}" for axis, size in partition.mesh.shape.items()]
    cut = [f"{name} along {'x'.join(partition.axes(name))}" for name, _ in partition.rules if partition.axes(name)]
    return [f"mesh: {', '.join(sizes)}", f"cut: {', '.join(cut) or 'nothing'}"]


def _spec(sharding: NamedSharding) -> str:
    names = ["x".join((part,) if isinstance(part, str) else part) if part else "-" for part in sharding.spec]
    return ", ".join(names) if any(name != "-" for name in names) else "whole"
