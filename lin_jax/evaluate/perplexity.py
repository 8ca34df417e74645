"""Exact perplexity and bits-per-byte of a language model on whole documents.

Every token of a document, its end token included, is counted once; padding never. The first token of a document is
conditioned on `tokenizer.start_id` alone, every other one on tokens before it in its own document. A document longer
than the window is read in windows that start `stride` tokens apart: the first scores all of its positions, each later
one only its last `stride`, so its first `window - stride` positions are context.
"""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from flax import nnx

from lin_jax.data.documents import validation_documents
from lin_jax.data.sources import open_source
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.decode.memory import require_memory
from lin_jax.experiment import Config
from lin_jax.layers.partition import Partition
from lin_jax.models.base import Model, require_next_tokens
from lin_jax.settings.base import require
from lin_jax.settings.data import DataConfig
from lin_jax.tasks.loss import LossSums, chunked_loss
from lin_jax.train.sharding import batch_sharding, batch_shards, make_partition

Rows = dict[str, np.ndarray]
_LINES = 10  # of progress, where there is no terminal
_RUN_AHEAD = 8  # batches that may wait on the device


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The measures of one text."""

    documents: int
    tokens: int
    bytes: int
    nll: float  # summed, in nats
    seconds: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer."""
        return self.nll / math.log(2) / self.bytes

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, perplexity {self.perplexity:.3f}, bits-per-byte {self.bits_per_byte:.4f} "
            f"({self.documents:,} documents, {self.tokens:,} tokens, {self.bytes:,} bytes, {self.seconds:.0f} s)"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        derived = {name: getattr(self, name) for name in ("loss", "perplexity", "bits_per_byte")}
        return {**derived, **dataclasses.asdict(self)}


def evaluate_run(
    model: Model,
    tokenizer: Tokenizer,
    config: Config,
    *,
    window: int,
    stride: int,
    batch_size: int,
    report: Callable[[str], None] = print,
) -> Perplexity:
    """The perplexity of a model on the validation split of `config.data`, over all devices.

    Args:
        model: as `load_model` gives it.
        tokenizer: the one it was trained with.
        config: names the data and the model.
        window: tokens that the model sees at a time.
        stride: tokens between the starts of windows, at most `window`.
        batch_size: windows at a time; rounded up to a multiple of the number of devices.
        report: is told of the progress where there is no terminal.

    Raises:
        ConfigError: the settings or the data are wrong.
    """
    require_next_tokens(model)
    require(config.model.attention.causal, "a model with model.attention.causal=false predicts no next token")
    # A window of any length stays whole.
    partition = make_partition(dataclasses.replace(config.mesh, rules=(*config.mesh.rules, "tokens=")))
    shards = batch_shards(partition)
    batch_size = math.ceil(batch_size / shards) * shards
    # What even one layer holds of a batch.
    size = 4 * batch_size * window * config.model.width
    require_memory(size, f"{batch_size} windows of {window:,} tokens at a time", "lower --window or --batch_size")
    total = _count_documents(config.data)
    documents = _with_progress(validation_documents(config.data, tokenizer), total, report)
    score = make_scorer(model, partition, chunk=max(1, config.train.loss_chunk * shards // batch_size))
    return measure(score, documents, tokenizer.start_id, window=window, stride=stride, batch_size=batch_size)


def measure(
    score: Callable[[Rows], LossSums],
    documents: Iterable[tuple[np.ndarray, int]],
    start_id: int,
    *,
    window: int,
    stride: int,
    batch_size: int,
) -> Perplexity:
    """The perplexity of documents, streamed, in batches of one shape.

    Args:
        score: sums of the losses of a batch of windows.
        documents: token ids and number of bytes of each.
        start_id: what the first token of a document is conditioned on.
        window: tokens in a row of a batch.
        stride: positions of a later window that are scored.
        batch_size: rows in a batch.

    Raises:
        ConfigError: stride or window is out of range, or there is no text.
    """
    require(window > 0, f"window must be greater than 0, but is {window}")
    require(0 < stride <= window, f"stride must lie between 1 and window={window}, but is {stride}")
    begin = time.perf_counter()
    counts = np.zeros(3, np.int64)
    rows = _all_windows(documents, counts, start_id, window, stride)
    nll, pending = 0.0, []
    for batch in _batches(rows, batch_size, window):
        pending.append(score(batch).nll)
        if len(pending) == _RUN_AHEAD:
            nll += _total(pending)
            pending = []
    nll += _total(pending)
    require(bool(counts[1] > 0), "there is no text to evaluate on")
    number, tokens, size = counts.tolist()
    return Perplexity(number, tokens, size, nll, time.perf_counter() - begin)


def make_scorer(model: nnx.Module, partition: Partition, *, chunk: int) -> Callable[[Rows], LossSums]:
    """A function from a batch of windows to the sums of its losses; see `chunked_loss` for `chunk`."""
    graph, state = nnx.split(model)
    sharding = batch_sharding(partition)

    @jax.jit
    def score(state: Any, batch: dict[str, jax.Array]) -> LossSums:
        merged: Any = nnx.merge(graph, state)
        hidden_BTC = merged.features(batch["tokens"], None, partition)
        return chunked_loss(merged.head, hidden_BTC, batch["targets"], batch["weights"], chunk=chunk)

    return lambda batch: score(state, jax.device_put(batch, sharding))


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first scored position, end) of the windows of a document; scored parts tile [0, length)."""
    scored = 0
    for start in itertools.count(0, stride):
        end = min(start + window, length)
        yield start, scored, end
        scored = end
        if end == length:
            return


def _all_windows(
    documents: Iterable[tuple[np.ndarray, int]], counts: np.ndarray, start_id: int, window: int, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(tokens, targets, positions that are only context) of every window; adds up documents, tokens and bytes."""
    for targets, size in documents:
        counts += (1, len(targets), size)
        tokens = np.concatenate(([start_id], targets[:-1])).astype(np.int32)
        for start, scored, end in windows(len(targets), window, stride):
            yield tokens[start:end], targets[start:end], scored - start


def _batches(rows: Iterator[tuple[np.ndarray, np.ndarray, int]], batch_size: int, window: int) -> Iterator[Rows]:
    for group in iter(lambda: list(itertools.islice(rows, batch_size)), []):
        batch: Rows = {
            "tokens": np.zeros((batch_size, window), np.int32),
            "targets": np.zeros((batch_size, window), np.int32),
            "weights": np.zeros((batch_size, window), np.float32),
        }
        for index, (tokens, targets, context) in enumerate(group):
            batch["tokens"][index, : len(tokens)] = tokens
            batch["targets"][index, : len(tokens)] = targets
            batch["weights"][index, context : len(tokens)] = 1
        yield batch


def _total(sums: list[Any]) -> float:
    return math.fsum(float(value) for value in jax.device_get(sums))


def _count_documents(config: DataConfig) -> int:
    source = open_source(config, "validation")
    return sum(source.ends(index) for index in range(len(source)))


def _with_progress(documents: Iterable[Any], total: int, report: Callable[[str], None]) -> Iterator[Any]:
    """`documents`, with a bar on a terminal and a few lines elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm.tqdm(documents, total=total, unit="document", dynamic_ncols=True)
        return
    begin = time.perf_counter()
    for index, document in enumerate(documents):
        yield document
        if total >= _LINES and (index + 1) % math.ceil(total / _LINES) == 0:
            left = (time.perf_counter() - begin) / (index + 1) * (total - index - 1)
            report(f"{index + 1}/{total} documents, {left:.0f} s left")
