"""What a task is: what a batch holds, the loss of it, what is measured, and which of the measures is best.

A run asks its task for all of this, and knows no task by name. A new task is a file with a subclass of `Task` and a
line in `lin_jax.tasks.registry`.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from flax import nnx

from lin_jax.data.tokenizers import Tokenizer
from lin_jax.layers.parameter import Path
from lin_jax.layers.partition import Partition
from lin_jax.models.base import ModelConfig
from lin_jax.models.flops import Flops
from lin_jax.models.registry import MODELS
from lin_jax.models.structure import Structure
from lin_jax.settings.base import require
from lin_jax.settings.data import DataConfig
from lin_jax.settings.finetune import FinetuneConfig
from lin_jax.settings.optimizer import OptimizerConfig
from lin_jax.settings.train import TrainConfig
from lin_jax.tasks.loss import LossSums

Batch = dict[str, jax.Array]
# (trained parameters, frozen parameters, constants, batch, random key of dropout) -> sums over the batch; the key is
# None for models without dropout.
Loss = Callable[[Any, Any, Any, Batch, jax.Array | None], LossSums]
# The first four of these -> a tree of arrays, which `Validation.sums` adds up over batches or `rows` joins.
Evaluation = Callable[[Any, Any, Any, Batch], Any]


@runtime_checkable
class RunSettings(Protocol):
    """The settings of a run that tasks read, as `lin_jax.experiment.Config` has them."""

    @property
    def model(self) -> ModelConfig: ...  # noqa: D102
    @property
    def data(self) -> DataConfig: ...  # noqa: D102
    @property
    def optimizer(self) -> OptimizerConfig: ...  # noqa: D102
    @property
    def train(self) -> TrainConfig: ...  # noqa: D102
    @property
    def finetune(self) -> FinetuneConfig: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class BatchField:
    """An array of a batch.

    Attributes:
        shape: of the array of a whole batch; the first dimension is its rows.
        axes: logical names of the dimensions, by which it is cut over devices; the first is "batch".
        dtype: of its entries.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any


@runtime_checkable
class Validation(Protocol):
    """A model of a run at some step, to be measured."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run."""

    def sums(self, name: str) -> Any:
        """Return what `Task.evaluation` gives, added up in float64 over the batches of a validation set."""

    def rows(self, name: str) -> Any:
        """Return what `Task.evaluation` gives, arrays [B, ...], joined over the batches of a validation set.

        Every process gets the rows of all, those that fill up a last batch among them.
        """

    def model(self) -> nnx.Module:
        """Return the model itself, to generate texts with."""


class ResultFile(NamedTuple):
    """A file that a run leaves behind at its end: its name in the run's directory, its text, and a line about it."""

    name: str
    text: str
    told: str


class Task(abc.ABC):
    """What a run of some settings learns.

    Attributes:
        config: the settings of the run.
        settings: the class of `config.finetune`, with the task's own settings.
        best_by: the measure by which the best checkpoint is chosen.
        higher_is_better: whether its highest value is the best, and not the lowest.
        validation_sets: names of the sets that are measured; measures of a set without a name keep theirs, others have
            the set's name in front.
        adds: names of what the task adds to a model, the first parts of its parameters' paths. These parameters are
            new where the model that a run starts from lacks them, and always train.
        starts_fresh: those of `adds` that are new also where the model that a run starts from has them.
        keeps_start: whether the loss also needs the parameters that train as they were at the start (a teacher).
        keeps_attention: whether a model must keep the attention that it has in `finetune.checkpoint`.
        needs_base: whether there must be a `finetune.checkpoint`.
        free_settings: settings that a resumed run may change.
        counts_examples: whether the data are examples that can be counted, so that `train.epochs` means something;
            such a task makes steps of them in `complete`.
        unit: what the weights of a batch count, for people.
    """

    settings: ClassVar[type[FinetuneConfig]] = FinetuneConfig
    best_by: str = "validation_loss"
    higher_is_better: bool = False
    validation_sets: tuple[str, ...] = ("",)
    adds: tuple[str, ...] = ()
    starts_fresh: tuple[str, ...] = ()
    keeps_start: ClassVar[bool] = False
    keeps_attention: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False
    free_settings: ClassVar[tuple[str, ...]] = ()
    counts_examples: ClassVar[bool] = False
    unit: ClassVar[str] = "tokens"

    def __init__(self, config: RunSettings):
        self.config = config

    def check(self) -> None:
        """Raise `ConfigError` for settings that the task cannot do with, in one line; call `super().check()` too."""
        finetune = self.config.finetune
        require(
            type(finetune) is self.settings,
            f"finetune is a {type(finetune).__name__}, but objective={finetune.objective} has its settings in a "
            f"{self.settings.__name__}: give one",
        )
        require(
            finetune.trains_model or bool(self.adds),
            "finetune.train is empty and there are no adapters: nothing to train",
        )
        require(
            bool(finetune.checkpoint) or not self.needs_base,
            f"finetune.checkpoint is empty, but objective={finetune.objective} changes a model: give the run to start "
            "from",
        )
        require(
            self.counts_examples or self.config.train.epochs == 0,
            f"train.epochs={self.config.train.epochs:g} needs examples that can be counted, which "
            f"objective={finetune.objective} has none of: give train.steps instead",
        )

    def free_of(self, base: ModelConfig) -> tuple[str, ...]:
        """Return settings of the model that may differ from those of `base`, which a run starts from.

        Raises:
            ConfigError: the task cannot start from such a model.
        """
        return ()

    def complete(self) -> RunSettings:
        """Return the settings of the run with those that its data decide, such as names of classes.

        It is asked once, before anything is made, also by a run that goes on; a run's saved settings are these.
        """
        return self.config

    def planned(self) -> RunSettings:
        """Return the settings by which a step is compiled where the data need not be there, see `complete`."""
        return self.config

    # What a batch holds, and where it is from.

    @abc.abstractmethod
    def batch_fields(self) -> Mapping[str, BatchField]:
        """Return the arrays of the largest batch by name; what the data have beside them is left out.

        Others may have fewer columns, not fewer rows. A step is compiled for each shape as it first comes.
        """

    @abc.abstractmethod
    def check_data(self, tokenizer: Tokenizer) -> str:
        """Return a fingerprint of the data that are trained on; raise `ConfigError` where they cannot be used."""

    @abc.abstractmethod
    def training_batches(self, tokenizer: Tokenizer, rows: Sequence[int] | np.ndarray) -> grain.DatasetIterator:
        """Return an endless sequence of batches, the given rows of each, whose state is JSON."""

    @abc.abstractmethod
    def validation_batches(
        self, name: str, tokenizer: Tokenizer, rows: Sequence[int] | np.ndarray
    ) -> grain.DatasetIterator:
        """Return the batches of a validation set, the given rows of each; the last is filled up with zeros."""

    def real_tokens(self, batch: Batch) -> tuple[jax.Array, int] | None:
        """Return how many tokens of a batch are no padding, and of how many: of batches that are not packed full."""
        return None

    # What is learned.

    @property
    def teachers(self) -> Mapping[str, str]:
        """Models that the loss needs beside the one that learns: by name, the runs that they are read from.

        While a run trains, its model has them under these names. They never train, and a run keeps none of them.
        """
        return {}

    def extend(self, model: Any, rngs: nnx.Rngs) -> None:  # noqa: B027 (most tasks add nothing)
        """Add to a new model what `adds` names."""

    def start(self, model: Any, known: Iterable[str]) -> None:  # noqa: B027
        """Set what was added to a model whose other parameters are in place; `known` are the paths of those."""

    @abc.abstractmethod
    def loss(self, structure: Structure, partition: Partition) -> Loss:
        """Return the function that is minimised; its sums do not depend on how a batch is cut into parts."""

    @property
    def row_tokens(self) -> int:
        """Return the tokens of a row for which `flops` counts."""
        return self.config.data.sequence_length

    @property
    def layer_tokens(self) -> int:
        """Return how many tokens of a row all layers read together."""
        model: Any = self.config.model
        encoder = model.encoder_depth if MODELS[model.architecture].reads_source else 0
        return model.depth * self.row_tokens + encoder * self.config.data.sequence_length

    @abc.abstractmethod
    def flops(self, trains: Callable[[Path], bool], *, tiled: bool) -> Flops:
        """Return the operations of a step for one token.

        Args:
            trains: whether the parameter at a path trains.
            tiled: whether softmax attention leaves out the masked half of its scores.
        """

    # What is measured.

    @abc.abstractmethod
    def evaluation(self, structure: Structure, partition: Partition) -> Evaluation:
        """Return the function whose sums over a validation set `values` turns into measures."""

    @abc.abstractmethod
    def values(self, sums: Any, tokenizer: Tokenizer) -> dict[str, float]:
        """Return the measures of a validation set by name."""

    @abc.abstractmethod
    def describe(self, values: Mapping[str, float]) -> str:
        """Return a line about the measures."""

    def measure(self, validation: Validation) -> dict[str, float]:
        """Return the measures of all validation sets, by name.

        A task that generates texts to be measured does so here, with `validation.model()`.
        """
        measured: dict[str, float] = {}
        for name in self.validation_sets:
            values = self.values(validation.sums(name), validation.tokenizer)
            measured |= {f"{name}_{key}" if name else key: value for key, value in values.items()}
        return measured

    def cost(self, values: Mapping[str, float]) -> float:
        """Return a number that is lowest for the best of several measured models."""
        return -values[self.best_by] if self.higher_is_better else values[self.best_by]

    def results(self, values: Mapping[str, float], validation: Validation) -> Sequence[ResultFile]:
        """Return the files that a finished run leaves behind, given its last measures: predictions, for example."""
        return ()
