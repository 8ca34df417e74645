"""The measures of a run's model, as its task makes them."""

import contextlib
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from lin_jax.data.tokenizers import Tokenizer
from lin_jax.layers.partition import Partition
from lin_jax.train.distributed import settled
from lin_jax.train.parts import Parts, make_evaluation
from lin_jax.train.sharding import replicated
from lin_jax.train.state import TrainState


class Evaluator:
    """Measures the states of one run; what is compiled for that is compiled once."""

    def __init__(self, parts: Parts, tokenizer: Tokenizer):
        self.parts, self.tokenizer = parts, tokenizer

    def measure(self, state: TrainState) -> dict[str, float]:
        """Return the measures of a state, by name."""
        return self.parts.task.measure(self.at(state))

    def at(self, state: TrainState) -> "StateValidation":
        """Return a state as tasks see it."""
        return StateValidation(self, state)

    @functools.cached_property
    def step(self) -> Any:
        """The jitted evaluation of a batch."""
        return make_evaluation(self.parts)


class StateValidation:
    """One state of a run, to be measured; see `lin_jax.tasks.base.Validation`."""

    def __init__(self, evaluator: Evaluator, state: TrainState):
        self._evaluator, self._state = evaluator, state

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run."""
        return self._evaluator.tokenizer

    def sums(self, name: str) -> Any:
        """Return the sums over the batches of a validation set, at most `train.evaluate_batches` of them."""
        return _add_up(self._evaluated(name))

    def rows(self, name: str) -> Any:
        """Return the rows of the batches of a validation set, at most `train.evaluate_batches` batches."""
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *self._evaluated(name))

    def _evaluated(self, name: str) -> Any:
        """Return what the task's evaluation gives for each batch."""
        parts, state = self._evaluator.parts, self._state
        found = []
        with contextlib.closing(parts.task.validation_batches(name, self.tokenizer, parts.feed.own)) as batches:
            for batch in itertools.islice(batches, parts.config.train.evaluate_batches or None):
                trees = state.parameters, state.frozen, state.constants
                found.append(settled(self._evaluator.step(*trees, parts.feed(batch))))
        return jax.device_get(found)

    def model(self) -> nnx.Module:
        """Return the model with this state's parameters; of several processes each has a whole copy, for itself."""
        parts, state = self._evaluator.parts, self._state
        trees = parts.structure.join(state.parameters, state.frozen), state.constants
        return parts.structure.merge(*(trees if jax.process_count() == 1 else _local_copies(trees, parts.partition)))


def _local_copies(trees: Any, partition: Partition) -> Any:
    """Return arrays of all processes as arrays of this one, whole."""
    whole = jax.jit(lambda trees: trees, out_shardings=replicated(partition))(trees)
    return jax.tree.map(lambda array: jax.numpy.asarray(array.addressable_data(0)), whole)


def _add_up(trees: Sequence[Any]) -> Any:
    """Return the sum of trees of arrays, in float64."""
    return jax.tree.map(lambda *arrays: np.sum(arrays, axis=0, dtype=np.float64), *trees)
