"""Whole documents of the validation split, for exact evaluation."""

from collections.abc import Iterator

import grain
import numpy as np

from lin_jax.data.pieces import tokens_of_piece
from lin_jax.data.pipeline import read_options
from lin_jax.data.sources import open_source
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.settings.data import DataConfig


def validation_documents(config: DataConfig, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    """The documents of the validation split in their order, one at a time.

    Yields:
        The token ids of a document, those of its whole text however it is read, with the end token, int32, each to be
        predicted once (the first from `tokenizer.start_id`), and the size of its text in UTF-8 bytes.
    """
    source = open_source(config, "validation")

    def tokenise(index: int) -> tuple[np.ndarray, int]:
        return tokens_of_piece(source, tokenizer, index)[0], len(source[index].encode())

    parts: list[np.ndarray] = []
    size = 0
    pieces = grain.MapDataset.range(len(source)).map(tokenise).to_iter_dataset(read_options())
    for index, (ids, piece_size) in enumerate(pieces):
        parts.append(ids)
        size += piece_size
        if source.ends(index):
            yield np.concatenate([*parts, np.array([tokenizer.end_id], np.int32)]), size
            parts, size = [], 0
