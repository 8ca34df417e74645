"""Batches of labelled examples on Grain, of rows of about the same length, so that little padding is computed.

The order of an epoch is a permutation by seed. Windows of it are tokenised as they come, sorted by length and cut into
batches, whose order is mixed again; the rows of a batch are filled up to the next of a few lengths, see `lengths`, for
each of which a program is compiled. Every example comes exactly once an epoch: the last batch of an epoch is filled up
with rows that weigh nothing. The state of the iterator is the number of batches.

All hosts walk through the same global batches and keep the rows that they need, as in `lin_jax.data.pipeline`.
"""

import threading
from collections.abc import Sequence

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
    made = _Batches(config, tokenizer, examples, labels, rows, trains)
    count = _ENDLESS if trains else made.in_epoch
    found = grain.MapDataset.range(count).map(made.batch).to_iter_dataset(grain.ReadOptions(num_threads=0))
    return iter(experimental.ThreadPrefetchIterDataset(found, prefetch_buffer_size=PREFETCHED_BATCHES))


def count_batches(config: DataConfig, examples: int) -> int:
    """Return the batches of an epoch."""
    return -(-examples // config.batch_size)


class _Batches:
    """All batches by number."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        examples: Examples,
        labels: np.ndarray,
        rows: Sequence[int] | np.ndarray | None,
        trains: bool,
    ):
        self._config, self._tokenizer, self._examples, self._labels = config, tokenizer, examples, labels
        self._rows = np.arange(config.batch_size) if rows is None else np.asarray(rows)
        self._trains = trains
        self._lengths = np.array(lengths(config.sequence_length, config.padding))
        self.in_epoch = count_batches(config, len(examples))
        self._window: tuple[tuple[int, int], list[list[int]], dict[int, tuple[np.ndarray, np.ndarray]]] | None = None
        self._lock = threading.Lock()

    def batch(self, number: int) -> Batch:
        """Return a batch."""
        epoch, number = divmod(int(number), self.in_epoch)
        window, place = divmod(number, WINDOW_BATCHES)
        with self._lock:
            if self._window is None or self._window[0] != (epoch, window):
                self._window = ((epoch, window), *self._read(epoch, window))
            _, batches, tokens = self._window
        return self._stack(batches[place], tokens)

    def _read(self, epoch: int, window: int) -> tuple[list[list[int]], dict[int, tuple[np.ndarray, np.ndarray]]]:
        """Return the examples of each batch of a window, and their tokens."""
        seed = (self._config.seed, 1 + epoch) if self._trains else (_VALIDATION_SEED, 0)
        order = np.random.default_rng(seed).permutation(len(self._examples))
        size = self._config.batch_size
        chosen = order[window * WINDOW_BATCHES * size : (window + 1) * WINDOW_BATCHES * size].tolist()
        part = self._examples.take(chosen)
        encoded = self._tokenizer.encode_examples(part.first, part.second, self._config.sequence_length)
        tokens = dict(zip(chosen, encoded, strict=True))
        # Examples of one length stay in their random order.
        chosen.sort(key=lambda example: len(tokens[example][0]))
        batches = [chosen[at : at + size] for at in range(0, len(chosen), size)]
        mixed = np.random.default_rng((*seed, window)).permutation(len(batches))
        return [batches[number] for number in mixed], tokens

    def _stack(self, chosen: list[int], tokens: dict[int, tuple[np.ndarray, np.ndarray]]) -> Batch:
        longest = max(len(tokens[example][0]) for example in chosen)
        T = self._lengths[np.searchsorted(self._lengths, longest)]
        own = [chosen[row] if row < len(chosen) else -1 for row in self._rows]
        shape = (len(own), int(T))
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
