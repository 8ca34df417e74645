"""Batches of labelled examples on Grain, of rows of about the same length, so that little padding is computed.

The order of an epoch is a permutation by seed. Windows of it are tokenised as they come, sorted by length and cut into
batches, whose order is mixed again; the rows of a batch are filled up to the next of a few lengths, see `lengths`, for
each of which a program is compiled. Every example comes exactly once an epoch: the last batch of an epoch is filled up
with rows that weigh nothing. The state of the iterator is the number of batches.

All hosts walk through the same global batches and keep the rows that they need, as in `lin_jax.data.pipeline`.
"""

import abc
import threading
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import grain
import numpy as np
from grain import experimental

from lin_jax.data.examples import Examples
from lin_jax.data.pipeline import PREFETCHED_BATCHES
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.settings.data import DataConfig

# Batches of a window. More give less padding, and more to tokenise before the first one and after a resume.
WINDOW_BATCHES = 50
# The shortest rows that a program is compiled for.
LEAST_LENGTH = 8
# Batches of a run, so many that it never sees the end.
_ENDLESS = 1 << 60
_VALIDATION_SEED = 0

_NOTHING = np.zeros(0, np.int32), np.zeros(0, np.int32)

Batch = dict[str, np.ndarray]


def lengths(longest: int, padding: str) -> list[int]:
    """Return the lengths that rows are filled up to: powers of two and the middles between them, and the longest."""
    found = []
    size = LEAST_LENGTH
    while padding == "bucket" and size < longest:
        found += [size, size * 3 // 2]
        size *= 2
    return [*(length for length in found if length < longest), longest]


def batches_of(
    config: DataConfig,
    tokenizer: Tokenizer,
    examples: Examples,
    labels: np.ndarray,
    rows: Sequence[int] | np.ndarray | None = None,
    *,
    trains: bool,
) -> grain.DatasetIterator:
    """Return the batches of examples: endlessly, in another order in each epoch, or each example once.

    Args:
        config: the data.
        tokenizer: makes tokens of texts.
        examples: the texts.
        labels: of each example, integers or numbers.
        rows: the rows of each batch that this host wants, by number; None for all.
        trains: whether to go on for ever in random orders. Else the order is always the same, and mixed, so that the
            first batches are a sample of all.

    Each batch is a dict of arrays, the first three [len(rows), T], the others [len(rows)]:

    - `tokens`, `token_types`, int32;
    - `segment_ids`, int32: 1, and 0 where there is padding;
    - `labels`, of the type of `labels`;
    - `weights`, float32: 1, and 0 for rows that fill up a batch;
    - `examples`, int32: the number of the example, -1 for such rows.
    """
    return iterate(_LabelledBatches(config, tokenizer, examples, labels, rows, trains))


def iterate(batches: "ExampleBatches[Any]") -> grain.DatasetIterator:
    """Return batches in turn, endlessly where they are trained on; some are made ahead."""
    count = _ENDLESS if batches.trains else batches.in_epoch
    found = grain.MapDataset.range(count).map(batches.batch).to_iter_dataset(grain.ReadOptions(num_threads=0))
    return iter(experimental.ThreadPrefetchIterDataset(found, prefetch_buffer_size=PREFETCHED_BATCHES))


def count_batches(config: DataConfig, examples: int) -> int:
    """Return the batches of an epoch."""
    return -(-examples // config.batch_size)


Encoded = TypeVar("Encoded")


class ExampleBatches(abc.ABC, Generic[Encoded]):
    """All batches by number; a subclass says what tokens an example becomes, and what a batch is made of.

    Attributes:
        trains: whether they go on for ever in random orders, see `batches_of`.
        in_epoch: batches of an epoch.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        examples: Any,
        rows: Sequence[int] | np.ndarray | None,
        trains: bool,
    ):
        """Take over examples, which have `len` and `take` as `Examples` has them; see `batches_of` for the rest."""
        self._config, self._tokenizer, self._examples = config, tokenizer, examples
        self._rows = np.arange(config.batch_size) if rows is None else np.asarray(rows)
        self.trains, self.in_epoch = trains, count_batches(config, len(examples))
        self._window: tuple[tuple[int, int], list[list[int]], dict[int, Encoded]] | None = None
        self._lock = threading.Lock()

    @abc.abstractmethod
    def encode(self, part: Examples) -> list[Encoded]:
        """Return the tokens of examples."""

    @abc.abstractmethod
    def size(self, encoded: Encoded) -> int:
        """Return the tokens by which examples are sorted."""

    @abc.abstractmethod
    def stack(self, chosen: list[int], own: list[int], tokens: dict[int, Encoded]) -> Batch:
        """Return a batch.

        Args:
            chosen: all of its examples, by number.
            own: the example of each row that is wanted, -1 for one that fills up the batch.
            tokens: of examples, by number.
        """

    def batch(self, number: int) -> Batch:
        """Return a batch."""
        epoch, number = divmod(int(number), self.in_epoch)
        window, place = divmod(number, WINDOW_BATCHES)
        with self._lock:
            if self._window is None or self._window[0] != (epoch, window):
                self._window = ((epoch, window), *self._read(epoch, window))
            _, batches, tokens = self._window
        chosen = batches[place]
        return self.stack(chosen, [chosen[row] if row < len(chosen) else -1 for row in self._rows], tokens)

    def _read(self, epoch: int, window: int) -> tuple[list[list[int]], dict[int, Encoded]]:
        """Return the examples of each batch of a window, and their tokens."""
        seed = (self._config.seed, 1 + epoch) if self.trains else (_VALIDATION_SEED, 0)
        order = np.random.default_rng(seed).permutation(len(self._examples))
        size = self._config.batch_size
        chosen = order[window * WINDOW_BATCHES * size : (window + 1) * WINDOW_BATCHES * size].tolist()
        tokens = dict(zip(chosen, self.encode(self._examples.take(chosen)), strict=True))
        # Examples of one length stay in their random order.
        chosen.sort(key=lambda example: self.size(tokens[example]))
        batches = [chosen[at : at + size] for at in range(0, len(chosen), size)]
        mixed = np.random.default_rng((*seed, window)).permutation(len(batches))
        return [batches[number] for number in mixed], tokens


def filled_length(sizes: Sequence[int], longest: int, padding: str) -> int:
    """Return the length that rows of these sizes are filled up to."""
    known = lengths(longest, padding)
    return known[int(np.searchsorted(known, max(sizes)))]


class _LabelledBatches(ExampleBatches[tuple[np.ndarray, np.ndarray]]):
    """Texts or pairs of texts as one row, with a label."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        examples: Examples,
        labels: np.ndarray,
        rows: Sequence[int] | np.ndarray | None,
        trains: bool,
    ):
        super().__init__(config, tokenizer, examples, rows, trains)
        self._labels = labels

    def encode(self, part: Examples) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return ids and types."""
        return self._tokenizer.encode_examples(part.first, part.second, self._config.sequence_length)

    def size(self, encoded: tuple[np.ndarray, np.ndarray]) -> int:
        """Return the length of the row."""
        return len(encoded[0])

    def stack(self, chosen: list[int], own: list[int], tokens: dict[int, tuple[np.ndarray, np.ndarray]]) -> Batch:
        """Return a batch, see `batches_of`."""
        sizes = [len(tokens[example][0]) for example in chosen]
        shape = (len(own), filled_length(sizes, self._config.sequence_length, self._config.padding))
        found = {name: np.zeros(shape, np.int32) for name in ("tokens", "token_types", "segment_ids")}
        labels = np.zeros(len(own), self._labels.dtype)
        for row, example in enumerate(own):
            ids, types = tokens.get(example, _NOTHING)
            if not len(ids):  # A row needs a token to read a class from.
                ids, types = np.array([self._tokenizer.end_id], np.int32), np.zeros(1, np.int32)
            found["tokens"][row, : len(ids)] = ids
            found["token_types"][row, : len(ids)] = types
            found["segment_ids"][row, : len(ids)] = 1
            labels[row] = self._labels[example] if example >= 0 else 0
        examples = np.array(own, np.int32)
        return {**found, "labels": labels, "weights": (examples >= 0).astype(np.float32), "examples": examples}
