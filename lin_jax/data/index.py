"""Where documents begin and end in text files: numpy offsets, made in one pass over each file.

The pass also finds everything that is wrong with a file (bytes that are not UTF-8, damaged JSON lines), so that a run
is refused before it starts. Its memory is a block of the file and 16 bytes a document. The offsets of large files are
kept in `data.cache_directory`, so that only the first run pays for the pass.
"""

import codecs
import contextlib
import json
import mmap
import os
import re
from collections.abc import Iterator

import numpy as np

from lin_jax.data.files import TextFile, cache_path, write_atomically
from lin_jax.settings.base import ConfigError, require
from lin_jax.settings.data import DataConfig

CACHED_FROM_BYTES = 1 << 26
_BLOCK = 1 << 20
_NOT_SPACE = re.compile(rb"\S")


def file_spans(file: TextFile, config: DataConfig) -> np.ndarray:
    """First byte and byte after the last of every document of a file that holds more than white space, int64 [N, 2].

    Raises:
        ConfigError: the file is not text, with its name and the offset or line number.
    """
    if os.path.getsize(file.path) < CACHED_FROM_BYTES:
        return _spans(file, config)
    what = ("spans", file.is_lines, config.separator, config.text_field, config.encoding_errors)
    cached = cache_path(file.path, config.cache_directory, repr(what), ".npy")
    if not cached.exists():
        spans = _spans(file, config)
        write_atomically(cached, lambda target: np.save(target, spans))
    return np.load(cached)


def cut_long_documents(file: TextFile, spans: np.ndarray, piece_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut plain documents longer than `piece_bytes` into pieces, at line ends where there are some.

    A line of JSON is not cut: it has to be parsed whole.

    Returns:
        The spans of the pieces, int64 [P, 2], and whether a piece ends its document, bool [P].
    """
    is_long = spans[:, 1] - spans[:, 0] > piece_bytes
    if file.is_lines or not is_long.any():
        return spans, np.ones(len(spans), bool)
    with _mapped(file.path) as text:
        ends = np.fromiter(
            (
                at
                for (start, stop), long in zip(spans.tolist(), is_long.tolist(), strict=True)
                for at in (_piece_ends(text, start, stop, piece_bytes) if long else (stop,))
            ),
            np.int64,
        )
    # The ends of documents are among the ends of pieces, and both rise.
    is_last = np.zeros(len(ends), bool)
    is_last[np.searchsorted(ends, spans[:, 1])] = True
    starts = np.empty_like(ends)
    starts[1:] = ends[:-1]
    starts[np.concatenate(([0], np.flatnonzero(is_last)[:-1] + 1))] = spans[:, 0]
    return np.stack([starts, ends], axis=1), is_last


def cut_in_two(file: TextFile, start: int, stop: int, position: int) -> int:
    """Where to cut a plain document so that both parts hold text: at most at `position`, or `start` for nowhere."""
    with _mapped(file.path) as text:
        return _border(text, start, min(position, stop - 1))


def _piece_ends(text: mmap.mmap, start: int, stop: int, piece_bytes: int) -> Iterator[int]:
    while stop - start > piece_bytes:
        start = _border(text, start, start + piece_bytes)
        yield start
    yield stop


def _border(text: mmap.mmap, start: int, position: int) -> int:
    """The last good place to cut in (start, position]: after a line end if one is near, else between characters."""
    line_end = text.rfind(b"\n", (start + position) // 2, position)
    if line_end >= 0:
        return line_end + 1
    # A UTF-8 character has at most three bytes after its first; more of them are not UTF-8, and cut anywhere.
    borders = (at for at in range(position, max(start, position - 4), -1) if text[at] & 0xC0 != 0x80)
    return next(borders, start if position - start < 4 else position)


def parse_line(line: bytes, config: DataConfig, where: str) -> str:
    """The text of a line of JSON.

    Raises:
        ConfigError: the line is damaged or has no such text; `where` says which line it is.
    """
    try:
        record = json.loads(line.decode("utf-8-sig", errors=config.encoding_errors))
    except UnicodeDecodeError as error:
        raise ConfigError(_not_utf8(where, error.start)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: this line is not JSON ({error})") from error
    text = record.get(config.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(record) if isinstance(record, dict) else f"none, it is a {type(record).__name__}"
        raise ConfigError(f"{where}: no text in field {config.text_field!r} (fields: {fields}); set data.text_field")
    return without_surrogates(text, config, where)


def without_surrogates(text: str, config: DataConfig, where: str) -> str:
    """The text, checked for halves of surrogate pairs, which JSON can spell but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        require(config.encoding_errors == "replace", _not_utf8(where, error.start))
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _not_utf8(where: str, offset: int) -> str:
    return f"{where}: not UTF-8 at byte {offset}; convert it, or set data.encoding_errors=replace"


@contextlib.contextmanager
def _mapped(path: str) -> Iterator[mmap.mmap]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        yield text


def _spans(file: TextFile, config: DataConfig) -> np.ndarray:
    if os.path.getsize(file.path) == 0:
        return np.empty((0, 2), np.int64)
    with _mapped(file.path) as text:
        if file.is_lines:
            return _pairs(_line_spans(text, file.name, config))
        if config.encoding_errors == "strict":
            _check_utf8(text, file.name)
        return _pairs(_plain_spans(text, config.separator))


def _pairs(spans: Iterator[tuple[int, int]]) -> np.ndarray:
    flat = np.fromiter((offset for span in spans for offset in span), np.int64)
    return flat.reshape(-1, 2)


def _line_spans(text: mmap.mmap, name: str, config: DataConfig) -> Iterator[tuple[int, int]]:
    start = 0
    for number, line in enumerate(iter(text.readline, b""), 1):
        if line.strip() and parse_line(line, config, f"{name} line {number}").strip():
            yield start, start + len(line)
        start += len(line)


def _plain_spans(text: mmap.mmap, separator: str | None) -> Iterator[tuple[int, int]]:
    start = len(codecs.BOM_UTF8) if text[:3] == codecs.BOM_UTF8 else 0
    for match in re.finditer(re.escape(separator.encode()), text) if separator else ():
        if _NOT_SPACE.search(text, start, match.start()):
            yield start, match.start()
        start = match.end()
    if _NOT_SPACE.search(text, start):
        yield start, len(text)


def _check_utf8(text: mmap.mmap, name: str) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(text), _BLOCK):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(text[start : start + _BLOCK], final=start + _BLOCK >= len(text))
        except UnicodeDecodeError as error:
            raise ConfigError(_not_utf8(name, start - pending + error.start)) from error
