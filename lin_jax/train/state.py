"""What a step reads and writes, as plain trees: parameters, constants, optimizer state and the number of steps."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lin_jax.layers.partition import Partition
from lin_jax.models.structure import Structure
from lin_jax.train.sharding import replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update reads and writes.

    `parameters` are the model's `nnx.Param`s that train, `frozen` the others, and `constants` its other variables, all
    as nested dictionaries. The leaves are arrays, or what stands for them: shapes, shardings.
    """

    step: Any
    parameters: Any
    frozen: Any
    constants: Any
    optimizer: Any


def state_shardings(structure: Structure, optimizer: optax.GradientTransformation, partition: Partition) -> TrainState:
    """Shardings of a whole `TrainState`: the optimizer's moments lie where their parameters do."""
    whole = replicated(partition)
    parameters, frozen = structure.split(structure.parameter_shardings(partition))
    shapes = jax.eval_shape(lambda: initial_state(structure, optimizer, jnp.uint32(0)))
    return TrainState(
        step=whole,
        parameters=parameters,
        frozen=frozen,
        constants=structure.constant_shardings(partition),
        optimizer=optax.tree_map_params(
            optimizer, lambda _, sharding: sharding, shapes.optimizer, parameters, transform_non_params=lambda _: whole
        ),
    )


def initial_state(
    structure: Structure,
    optimizer: optax.GradientTransformation,
    seed: jax.Array,
    known: Mapping[str, jax.Array] | None = None,
) -> TrainState:
    """The state before the first step; jit it with `out_shardings` so that no device ever holds it whole.

    Args:
        structure: the model.
        optimizer: of the parameters that train.
        seed: of new parameters.
        known: parameters and constants that are not new, by path joined by dots.
    """
    parameters, constants = structure.initialise(seed)
    if known:
        parameters, constants = (_replaced(tree, known) for tree in (parameters, constants))
        parameters = structure.complete(parameters, constants, known)
    trained, frozen = structure.split(parameters)
    trained = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained)
    frozen = jax.tree.map(lambda leaf: leaf.astype(structure.frozen_dtype), frozen)
    return TrainState(jnp.zeros((), jnp.int32), trained, frozen, constants, optimizer.init(trained))


def _replaced(tree: Any, known: Mapping[str, jax.Array]) -> Any:
    """`tree` with the leaves that are known."""
    flat = nnx.traversals.flatten_mapping(tree)
    return nnx.traversals.unflatten_mapping({path: known.get(".".join(path), leaf) for path, leaf in flat.items()})


def abstract_state(structure: Structure, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Shapes, types and shardings of a `TrainState`: what a compilation or a restore needs."""
    shapes = jax.eval_shape(lambda: initial_state(structure, optimizer, jnp.uint32(0)))
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
    )
