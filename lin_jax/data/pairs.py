"""Sources and targets as batches: a row of each, filled up to one of a few lengths."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from lin_jax.data.batches import Batch, ExampleBatches, filled_length, iterate
from lin_jax.data.examples import Examples
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.settings.data import DataConfig


class Pair(NamedTuple):
    """The token ids of a source and of a target, each with the end of a text."""

    source: np.ndarray
    target: np.ndarray


def pair_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    examples: Any,
    rows: Sequence[int] | np.ndarray | None = None,
    *,
    start_token: int,
    trains: bool,
) -> grain.DatasetIterator:
    """Return the batches of pairs: endlessly, in another order in each epoch, or each pair once.

    Args:
        config: the data.
        tokenizer: makes tokens of texts.
        examples: from `lin_jax.data.examples.open_pairs`.
        rows: the rows of each batch that this host wants, by number; None for all.
        start_token: the token before a target's first one.
        trains: see `lin_jax.data.batches.batches_of`.

    Each batch is a dict of arrays, `source` and `source_ids` [len(rows), S], the others but `examples` [len(rows), T]:

    - `source`, int32, and `source_ids`: 1, and 0 where there is padding;
    - `tokens`, int32: the start token, and the target without its last token;
    - `targets`, int32: the target;
    - `weights`, float32: 1, and 0 where there is padding;
    - `examples`, int32 [len(rows)]: the number of the pair, -1 for rows that fill up a batch.
    """
    return iterate(_PairBatches(config, tokenizer, examples, rows, start_token, trains))


def encode_sources(
    texts: Sequence[str], tokenizer: Tokenizer, prefix: str = "", length: int | None = None
) -> list[np.ndarray]:
    """Return the token ids of sources as models are to read them: with a prefix, cut to a length, and ended."""
    return [_ended(ids, tokenizer, length) for ids in tokenizer.encode_all([prefix + text for text in texts])]


def _ended(ids: np.ndarray, tokenizer: Tokenizer, length: int | None) -> np.ndarray:
    return np.append(ids if length is None else ids[: length - 1], np.int32(tokenizer.end_id))


class _PairBatches(ExampleBatches[Pair]):
    """Pairs, sorted by the length of their sources, which are nearly always longer than targets."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        examples: Any,
        rows: Sequence[int] | np.ndarray | None,
        start_token: int,
        trains: bool,
    ):
        super().__init__(config, tokenizer, examples, rows, trains)
        self._start_token = start_token

    def encode(self, part: Examples) -> list[Pair]:
        """Return the tokens of both."""
        config = self._config
        sources = encode_sources(part.first, self._tokenizer, config.prefix, config.sequence_length)
        targets = encode_sources(part.second or (), self._tokenizer, length=config.target_length)
        return [Pair(source, target) for source, target in zip(sources, targets, strict=True)]

    def size(self, encoded: Pair) -> int:
        """Return the length of the source."""
        return len(encoded.source)

    def stack(self, chosen: list[int], own: list[int], tokens: dict[int, Pair]) -> Batch:
        """Return a batch, see `pair_batches`."""
        config = self._config
        S = filled_length([len(tokens[example].source) for example in chosen], config.sequence_length, config.padding)
        T = self._target_length([len(tokens[example].target) for example in chosen])
        found: Batch = {name: np.zeros((len(own), S), np.int32) for name in ("source", "source_ids")}
        found |= {name: np.zeros((len(own), T), np.int32) for name in ("tokens", "targets")}
        found["weights"] = np.zeros((len(own), T), np.float32)
        nothing = Pair(np.array([self._tokenizer.end_id], np.int32), np.zeros(0, np.int32))
        for row, example in enumerate(own):
            pair = tokens.get(example, nothing)
            source, target = pair.source, pair.target
            found["source"][row, : len(source)], found["source_ids"][row, : len(source)] = source, 1
            found["tokens"][row, : len(target)] = [self._start_token, *target[:-1]][: len(target)]
            found["targets"][row, : len(target)], found["weights"][row, : len(target)] = target, 1
        return {**found, "examples": np.array(own, np.int32)}

    def _target_length(self, sizes: Sequence[int]) -> int:
        """Return half of the longest target, or all of it: more lengths would double the programs to compile."""
        most = self._config.target_length
        half = -(-most // 2)
        return half if self._config.padding == "bucket" and max(sizes) <= half else most
