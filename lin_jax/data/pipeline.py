"""Rows of tokens for training and validation, on Grain.

Every document becomes pairs (token, next token), starting from `tokenizer.start_id`, so each token of the corpus, ends
of documents included, is predicted exactly once an epoch, whatever the packing. A long document is read in pieces, each
with its part of the document's pairs, see `lin_jax.data.pieces`. The pairs are packed into rows, the rows shuffled
within a window, so that a batch isn't a few long documents, and batched.

All hosts walk through the same global batches and keep the rows that they need. So the order of batches and the state
of the iterator do not depend on the hosts, and a run resumes exactly on another number of them.
The price is that each host reads and tokenises all text. Two CPU cores make about half a million GPT-2 tokens a second,
or ten million bytes, and it grows with the cores of a host, while sharding the text would make the order of batches
depend on the lengths of documents on each host.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental

from lin_jax.data.pieces import tokens_of_piece
from lin_jax.data.sources import Source, open_source
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.settings.data import DataConfig

# A window of rows is tokenised before the first batch and again after a resume, which takes a second or two.
WINDOW_ROWS = 1 << 10
WINDOW_TOKENS = 1 << 20
# Evaluation often takes only the first batches, and should not tokenise many more.
VALIDATION_WINDOW_BATCHES = 32
PACKING_BINS = 256
PREFETCHED_BATCHES = 4
BYTES_MEASURED = 1 << 23
_VALIDATION_SEED = 0

Batch = dict[str, np.ndarray]
MakeRows = Callable[[grain.IterDataset], grain.IterDataset]


def _as_they_are(rows: grain.IterDataset) -> grain.IterDataset:
    return rows


def training_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    rows: Sequence[int] | np.ndarray | None = None,
    make_rows: MakeRows = _as_they_are,
) -> grain.DatasetIterator:
    """Rows of an endless sequence of batches, in another order in each epoch.

    Args:
        config: the data.
        tokenizer: makes tokens of it.
        rows: the rows of each batch that this host wants, by number; None for all.
        make_rows: what is batched, of rows as below.

    Each batch is a dict of arrays [len(rows), T]:

    - `tokens`, `targets` (the next tokens), int32;
    - `segment_ids`, int32: documents in a row counted from 1 under packing=segments, all 1 under
      packing=concatenate, 0 where there is padding;
    - `weights`, float32: 1, and 0 where there is padding.

    `get_state()` is JSON, the same on every host, and the iterator is exact after `set_state()` of it. Close the
    iterator at the end: its threads run ahead.

    Raises:
        ConfigError: the data can't be had.
    """
    source = open_source(config, "train")
    pieces = grain.MapDataset.range(len(source)).seed(config.seed).shuffle().repeat()
    text_rows = _rows(_pairs(pieces, source, tokenizer), config, config.seed, _window(config))
    return batch_rows(make_rows(text_rows), config.batch_size, rows)


def validation_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    rows: Sequence[int] | np.ndarray | None = None,
    make_rows: MakeRows = _as_they_are,
) -> grain.DatasetIterator:
    """Rows of the batches of the validation split, each of its tokens once; see `training_batches`.

    The order is always the same and mixes documents, so the first batches are a sample of all. The last batch is
    filled up with rows of padding.
    """
    source = open_source(config, "validation")
    pieces = grain.MapDataset.range(len(source)).shuffle(seed=_VALIDATION_SEED)
    window = min(_window(config), VALIDATION_WINDOW_BATCHES * config.batch_size)
    text_rows = _rows(_pairs(pieces, source, tokenizer), config, _VALIDATION_SEED, window)
    return batch_rows(make_rows(text_rows), config.batch_size, rows)


def validation_bytes_per_token(config: DataConfig, tokenizer: Tokenizer) -> float:
    """UTF-8 bytes of the validation split for each token that is predicted, ends of documents included.

    Of a split larger than `BYTES_MEASURED`, a random part of that size is measured.
    """
    source = open_source(config, "validation")
    size = tokens = 0
    for index in grain.MapDataset.range(len(source)).shuffle(seed=_VALIDATION_SEED):
        text = source[index]
        size += len(text.encode())
        tokens += len(tokens_of_piece(source, tokenizer, index)[0]) + source.ends(index)
        if size >= BYTES_MEASURED:
            break
    return size / tokens


def read_options() -> grain.ReadOptions:
    """As many threads as there are cores read and tokenise, a few pieces ahead."""
    threads = os.cpu_count() or 1
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)


def token_pairs(source: Source, tokenizer: Tokenizer, index: int) -> np.ndarray:
    """The pairs (token, next token) of a piece, int32 [n, 2]; all pieces of a document together have all of its."""
    targets, before = tokens_of_piece(source, tokenizer, index)
    if source.ends(index):
        targets = np.append(targets, np.int32(tokenizer.end_id))
    tokens = np.concatenate(([np.int32(tokenizer.start_id if before is None else before)], targets))[:-1]
    return np.stack([tokens, targets], axis=1).astype(np.int32)


def _pairs(pieces: grain.MapDataset, source: Source, tokenizer: Tokenizer) -> grain.IterDataset:
    tokenised = pieces.map(lambda index: {"pairs": token_pairs(source, tokenizer, index)})
    return tokenised.to_iter_dataset(read_options())


def _window(config: DataConfig) -> int:
    return max(min(WINDOW_ROWS, WINDOW_TOKENS // config.sequence_length), 2 * config.batch_size)


def _rows(pairs: grain.IterDataset, config: DataConfig, seed: int, window: int) -> grain.IterDataset:
    length = {"pairs": config.sequence_length}
    if config.packing == "segments":
        parts = experimental.FlatMapIterDataset(pairs, _SplitLong(config.sequence_length))
        packed = experimental.FirstFitPackIterDataset(
            parts, length_struct=length, num_packing_bins=PACKING_BINS, seed=seed
        )
        return packed.map(_segmented_row)
    packed = _RestoreFromJson(experimental.ConcatThenSplitIterDataset(pairs, length_struct=length))
    return experimental.WindowShuffleIterDataset(packed, window_size=window, seed=seed).map(_plain_row)


def _segmented_row(packed: Batch) -> Batch:
    segment_ids = packed["pairs_segment_ids"]
    tokens, targets = packed["pairs"].T
    weights = (segment_ids > 0).astype(np.float32)
    return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids, "weights": weights}


def _plain_row(packed: Batch) -> Batch:
    row = _segmented_row(packed)
    return {**row, "segment_ids": (row["segment_ids"] > 0).astype(np.int32)}


def batch_rows(
    rows: grain.IterDataset, batch_size: int, own: Sequence[int] | np.ndarray | None = None
) -> grain.DatasetIterator:
    """Return the batches of rows, which are dictionaries of arrays.

    Args:
        rows: all rows, in their order.
        batch_size: rows of a batch; a last one that is not full is filled up with zeros.
        own: the rows of each batch that this host wants, by number; None for all.
    """
    numbers = range(batch_size) if own is None else own
    batches = rows.batch(batch_size, batch_fn=lambda batch: _stack(batch, numbers))
    return iter(experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PREFETCHED_BATCHES))


def _stack(rows: Sequence[Batch], numbers: Sequence[int] | np.ndarray) -> Batch:
    """Some rows of a batch; those that are missing are padding."""
    padding = {name: np.zeros_like(column) for name, column in rows[0].items()}
    wanted = [rows[number] if number < len(rows) else padding for number in numbers]
    return {name: np.stack([row[name] for row in wanted]) for name in padding}


class _SplitLong(experimental.FlatMapTransform):
    """Cuts documents into parts that fit into a row."""

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, element: Batch) -> list[Batch]:
        pairs = element["pairs"]
        return [{"pairs": pairs[at : at + self._length]} for at in range(0, len(pairs), self._length)]


class _RestoreFromJson(grain.IterDataset):
    """Lets ConcatThenSplit take back its state from JSON.

    It compares slices with the tuple (-1, -1) for "none"; JSON makes a list of it, which Grain (seen in 0.2.18) takes
    for a slice, and then drops a document.
    """

    def __iter__(self) -> "_RestoreFromJsonIterator":
        return _RestoreFromJsonIterator(self._parent.__iter__())


class _RestoreFromJsonIterator(grain.DatasetIterator):
    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        slices = {name: tuple(part) for name, part in state["remainder_slices"].items()}
        self._parent.set_state({**state, "remainder_slices": slices})
