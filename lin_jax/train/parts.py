"""What is computed in a run, without its numbers: its task, model, optimizer and step."""

import dataclasses
import functools
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding

from lin_jax.experiment import Config
from lin_jax.layers.partition import Partition
from lin_jax.models.structure import Structure
from lin_jax.tasks.base import Task
from lin_jax.tasks.registry import task_of
from lin_jax.train.feed import Feed
from lin_jax.train.optimizer import learning_rate_schedule, make_optimizer
from lin_jax.train.sharding import batch_shardings
from lin_jax.train.state import TrainState, state_shardings
from lin_jax.train.step import make_evaluation_step, make_train_step
from lin_jax.train.trainable import structure_of


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run on the devices of `partition`; `shardings` says where its state lies."""

    config: Config
    task: Task
    partition: Partition
    structure: Structure
    optimizer: optax.GradientTransformation
    shardings: TrainState

    @functools.cached_property
    def of_batch(self) -> dict[str, NamedSharding]:
        """Where the arrays of a batch lie."""
        return batch_shardings(self.partition, self.task.batch_fields())

    @functools.cached_property
    def feed(self) -> Feed:
        """What this process reads of a batch."""
        by_row = self.partition.place(self.partition.axes("batch"))
        return Feed(self.of_batch, by_row, self.config.data.batch_size)

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        assert self.partition.mesh is not None
        return self.partition.mesh


def make_parts(config: Config, partition: Partition) -> Parts:
    """Return the parts of a run on the devices of `partition`."""
    structure = structure_of(config)
    decay, _ = structure.split(structure.metadata("decay"))
    optimizer = make_optimizer(config.optimizer, config.train.steps, decay)
    shardings = state_shardings(structure, optimizer, partition)
    return Parts(config, task_of(config), partition, structure, optimizer, shardings)


def make_step(parts: Parts) -> Any:
    """Return the jitted update of a run."""
    config = parts.config
    return make_train_step(
        parts.task.loss(parts.structure, parts.partition),
        parts.optimizer,
        learning_rate_schedule(config.optimizer, config.train.steps),
        config.train.microbatches,
        parts.shardings,
        parts.of_batch,
        parts.partition,
        config.train.seed if getattr(config.model, "dropout", 0) else None,
        parts.task.real_tokens,
    )


def make_evaluation(parts: Parts) -> Any:
    """Return the jitted sums that a run's task makes of a batch."""
    evaluation = parts.task.evaluation(parts.structure, parts.partition)
    return make_evaluation_step(evaluation, parts.shardings, parts.of_batch, parts.partition)


def abstract_batch(parts: Parts) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes, types and shardings of the largest batch that `make_step` reads."""
    return {
        name: jax.ShapeDtypeStruct(field.shape, field.dtype, sharding=parts.of_batch[name])
        for name, field in parts.task.batch_fields().items()
    }
