"""Sources: random-access sequences of documents, which stream from disk.

A source is cut into pieces, so that memory stays bounded whatever the size of a document: element i is the text of
piece i, and nearly always a whole document. `source.ends(i)` says whether the piece is the last of its document; the
pieces of a document follow each other.

Where a source has no validation split of its own, documents spread evenly over it are held out. Where there are too
few documents for that (fewer than half a document would be held out), the end of each one is. Both splits depend on
the files and on `validation_fraction` alone.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from lin_jax.data.files import TextFile, stdlib_files, text_files
from lin_jax.data.holdout import held_out
from lin_jax.data.index import cut_in_two, cut_long_documents, file_spans, parse_line
from lin_jax.settings.base import require
from lin_jax.settings.data import DataConfig

Split = Literal["train", "validation"]
# Training shuffles pieces. This many for each token of a row keeps what a model can see in one piece.
TRAIN_PIECE_BYTES_PER_TOKEN = 64
LEAST_TRAIN_PIECE_BYTES = 1 << 16
VALIDATION_PIECE_BYTES = 1 << 20


@runtime_checkable
class Source(Protocol):
    """A random-access sequence of texts, the pieces of documents."""

    def __len__(self) -> int:
        """Number of pieces."""
        ...

    def __getitem__(self, index: int) -> str:
        """The text of a piece."""
        ...

    def ends(self, index: int) -> bool:
        """Whether a piece is the last one of its document."""
        ...

    @property
    def fingerprint(self) -> str:
        """Another one for pieces in other places, which training would read in another order."""
        ...


def open_source(config: DataConfig, split: Split) -> Source:
    """The documents of a split.

    Raises:
        ConfigError: the data is not there or is not text; the message says what to do.
    """
    if config.source == "tfds":
        from lin_jax.data.tfds_source import open_tfds

        return open_tfds(config, split)
    if config.source == "stdlib":
        plain = dataclasses.replace(config, separator=None, encoding_errors="replace")
        return _open_files(stdlib_files(), plain, split, has_both=True)
    require(config.source == "text", f"data.source={config.source} has labelled examples, not a text to read on")
    return _open_text(config, split)


@dataclasses.dataclass(frozen=True, eq=False)
class TextSource:
    """Documents of text files, read when they are asked for; memory is 21 bytes a document."""

    config: DataConfig
    files: Sequence[TextFile]
    file_numbers: np.ndarray  # the file of every piece
    spans: np.ndarray  # [pieces, 2], its first byte and the byte after its last
    are_last: np.ndarray  # whether it ends its document

    def __len__(self) -> int:
        """Number of pieces."""
        return len(self.file_numbers)

    def __getitem__(self, index: int) -> str:
        """The text of a piece."""
        file = self.files[self.file_numbers[index]]
        start, stop = self.spans[index].tolist()
        with open(file.path, "rb") as opened:
            opened.seek(start)
            raw = opened.read(stop - start)
        if file.is_lines:
            return parse_line(raw, self.config, f"{file.name} line at byte {start}")
        return raw.decode("utf-8", errors=self.config.encoding_errors)

    def ends(self, index: int) -> bool:
        """Whether a piece is the last one of its document."""
        return bool(self.are_last[index])

    @property
    def fingerprint(self) -> str:
        """A checksum of where the pieces lie; neither of the names of files, nor of the text."""
        found = hashlib.sha256()
        for array in (self.file_numbers, self.spans, self.are_last):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()[:16]


def _open_text(config: DataConfig, split: Split) -> TextSource:
    train = text_files(config.path, "data.path", config.cache_directory)
    if not config.validation_path:
        return _open_files(train, config, split, has_both=True)
    validation = text_files(config.validation_path, "data.validation_path", config.cache_directory)
    both = sorted({file.name for file in train} & {file.name for file in validation})
    require(not both, f"{', '.join(both)} is in data.path and in data.validation_path; leave it out of one")
    return _open_files(train if split == "train" else validation, config, split, has_both=False)


def _open_files(files: Sequence[TextFile], config: DataConfig, split: Split, *, has_both: bool) -> TextSource:
    """The documents of some files; with `has_both`, those of `split` only."""
    spans = [file_spans(file, config) for file in files]
    documents = sum(map(len, spans))
    named = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
    require(documents > 0, f"no text in {named}: empty, or nothing but white space; give other files")
    if has_both:
        too_few = documents == 1 or round(documents * config.validation_fraction) < 1
        divide = _divide_each if too_few and not any(file.is_lines for file in files) else _divide_documents
        spans = divide(files, spans, config, split)
        require(sum(map(len, spans)) > 0, f"too little text in {named} to hold some out; give data.validation_path")
    return _cut_files(files, spans, config, split)


def _divide_documents(
    files: Sequence[TextFile], spans: Sequence[np.ndarray], config: DataConfig, split: Split
) -> list[np.ndarray]:
    """The documents of a split."""
    documents = sum(map(len, spans))
    require(documents > 1, f"{files[0].name} has one document; hold others out with data.validation_path")
    wanted = held_out(documents, config.validation_fraction) == (split == "validation")
    borders = np.cumsum([len(span) for span in spans])[:-1]
    return [span[mask] for span, mask in zip(spans, np.split(wanted, borders), strict=True)]


def _divide_each(
    files: Sequence[TextFile], spans: Sequence[np.ndarray], config: DataConfig, split: Split
) -> list[np.ndarray]:
    """The parts of a few documents that belong to a split: their beginnings, or the ends that are held out."""
    return [
        np.array([part for start, stop in span.tolist() if (part := _part(file, start, stop, config, split))])
        .astype(np.int64)
        .reshape(-1, 2)
        for file, span in zip(files, spans, strict=True)
    ]


def _part(file: TextFile, start: int, stop: int, config: DataConfig, split: Split) -> tuple[int, int] | None:
    position = start + max(1, round((stop - start) * (1 - config.validation_fraction)))
    at = start if stop - start < 2 else cut_in_two(file, start, stop, position)
    if split == "train":
        return (start, at) if at > start else (start, stop)
    return (at, stop) if at > start else None


def _cut_files(files: Sequence[TextFile], spans: Sequence[np.ndarray], config: DataConfig, split: Split) -> TextSource:
    piece_bytes = VALIDATION_PIECE_BYTES
    if split == "train":
        piece_bytes = max(LEAST_TRAIN_PIECE_BYTES, TRAIN_PIECE_BYTES_PER_TOKEN * config.sequence_length)
    cut = [cut_long_documents(file, span, piece_bytes) for file, span in zip(files, spans, strict=True)]
    counts = [len(span) for span, _ in cut]
    return TextSource(
        config,
        files,
        np.repeat(np.arange(len(files), dtype=np.int32), counts),
        np.concatenate([span for span, _ in cut]),
        np.concatenate([ends for _, ends in cut]),
    )
