"""What a training run needs, found without its parameters: the step is compiled for devices that are not there."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.config import Config
from lin_jax.layers.partition import Partition
from lin_jax.models.flops import training_flops_per_token
from lin_jax.train import sharding
from lin_jax.train.loop import abstract_batch, make_parts, make_step
from lin_jax.train.state import abstract_state


def use_virtual_devices(config: Config) -> None:
    """Make this process see the CPU devices that `config.plan` asks for; call it before anything is computed."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(config.plan.partition(":")[2]))


def plan(config: Config) -> str:
    """A table of parameters, optimizer state, and what the compiled step needs on each device.

    Raises:
        ConfigError: the settings do not fit the devices.
    """
    partition = sharding.make_partition(config.mesh)
    sharding.check_fit(config, partition)
    parts = make_parts(config, partition)
    state = abstract_state(parts.structure, parts.optimizer, parts.shardings)
    compiled = make_step(parts).lower(state, abstract_batch(parts)).compile()
    analysis = compiled.memory_analysis()
    shapes, _ = jax.eval_shape(parts.structure.initialise, jnp.uint32(0))
    needs_layers = config.finetune.trains_model  # Heads alone send nothing back into the model.
    rows = [
        ("parameters", f"{_count(shapes):,}"),
        ("trained", f"{_count(state.parameters):,}"),
        ("trained parameters", _size(state.parameters)),
        ("their gradients", _size(state.parameters)),
        ("optimizer state", _size(state.optimizer)),
        ("frozen parameters", _size(state.frozen)),
        *([("layer inputs kept for the backward pass", _layer_inputs(config, partition))] if needs_layers else []),
        ("temporaries of the compiled step", f"{analysis.temp_size_in_bytes:,} bytes a device"),
    ]
    width = max(len(name) for name, _ in rows)
    tokens = config.data.batch_size * config.data.sequence_length
    flops = training_flops_per_token(config.model, config.data.sequence_length) * tokens
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
    told = ", ".join(f"{name} {size}" for name, size in parts.mesh.shape.items())
    return "\n".join([f"{config.plan}: {told}; {tokens:,} tokens and {flops:.3g} FLOPs a step", *lines])


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _size(tree: Any) -> str:
    """Bytes on each device, and altogether."""
    leaves = jax.tree.leaves(tree)
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    own = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return f"{own:,} bytes a device, {whole:,} in one copy"


def _layer_inputs(config: Config, partition: Partition) -> str:
    """What rematerialisation keeps: the features that enter every layer, for the rows of a microbatch."""
    rows = config.data.batch_size // config.train.microbatches // sharding.batch_shards(partition)
    itemsize = np.dtype(config.model.dtype).itemsize
    tokens = rows * config.data.sequence_length // partition.shards("tokens")
    size = config.model.depth * tokens * config.model.width * itemsize
    return f"{size:,} bytes a device, with model.remat=full"
