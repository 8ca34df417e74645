"""Tables of text: TSV, CSV and JSON Lines, read whole into columns.

TSV is read as GLUE writes it: a line is a row, a tab a border, and quotes are characters like others. CSV may quote.
A JSON Lines file has an object a line. All are UTF-8, with or without a mark of byte order, plain or with .gz or .zst.
"""

import csv
import functools
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lin_jax.data.files import COMPRESSED_SUFFIXES, seekable
from lin_jax.paths import is_remote
from lin_jax.settings.base import ConfigError, first_line, require
from lin_jax.settings.foreign import line_object
from lin_jax.settings.typed import shown

KINDS = {".tsv": "tsv", ".txt": "tsv", ".csv": "csv", ".jsonl": "jsonl"}
# Characters of a field; the csv module's own limit is 131,072.
_LONGEST_FIELD = 1 << 30


class Table(NamedTuple):
    """The columns of a file by name, all of one length, and the line that each row begins in, counted from 1.

    Columns of TSV and CSV are texts; those of JSON Lines hold what the file does, None where a row has no such field.
    """

    name: str
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int]

    def where(self, row: int) -> str:
        """Return the place of a row, for messages."""
        return f"{self.name} line {self.lines[row]}"

    def column(self, name: str, setting: str) -> Sequence[Any]:
        """Return a column; raise `ConfigError` where there is none of this name, which `setting` gave."""
        told = ", ".join(self.columns)
        require(name in self.columns, f"{self.name} has no column {name!r}; set {setting} to one of {told}")
        return self.columns[name]

    def texts(self, name: str, setting: str) -> Sequence[str]:
        """Return a column of texts; raise `ConfigError` where it holds anything else."""
        found = self.column(name, setting)
        for row, value in enumerate(found):
            require(isinstance(value, str), f"{self.where(row)}: {name} is no text, but {shown(value)}")
        return found


def read_table(path: str, cache_directory: str, *, header: Sequence[str] = (), skip_ragged: bool = False) -> Table:
    """Return the table in a file; one that has not changed is not read again.

    Args:
        path: of a file; its suffix says what it is.
        cache_directory: where compressed and remote files are kept uncompressed.
        header: names of the columns of a file that does not begin with them.
        skip_ragged: leave out rows of TSV with too few or too many columns instead of refusing them.

    Raises:
        ConfigError: it is not there, or damaged, with the line.
    """
    path = os.path.expanduser(path)
    kind = KINDS.get(_suffix(path))
    require(kind is not None, f"{path}: unknown suffix; tables end in {', '.join(KINDS)}, plain or with .gz or .zst")
    if not is_remote(path):
        require(os.path.exists(path), f"{path} does not exist")
        require(os.path.isfile(path), f"{path} is not a file")
    local = seekable(path, cache_directory)
    try:
        status = os.stat(local)
        return _read(path, local, kind or "", tuple(header), skip_ragged, (status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {first_line(error)}") from error


def _suffix(path: str) -> str:
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED_SUFFIXES else suffix


@functools.lru_cache(maxsize=8)
def _read(name: str, local: str, kind: str, header: Sequence[str], skip_ragged: bool, version: Any) -> Table:
    """Read a file; `version` is another one as soon as it changes."""
    with open(local, "rb") as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name} line {line}: not UTF-8; convert it") from error
    nul = text.find("\0")
    require(nul < 0, f"{name} line {text.count(chr(10), 0, nul) + 1}: holds a NUL character; remove it")
    if kind == "jsonl":
        return _from_objects(name, text)
    rows = _tsv_rows(text) if kind == "tsv" else _csv_rows(name, text)
    return _from_rows(name, rows, header, skip_ragged)


def _tsv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    # Not str.splitlines, which also breaks at characters that texts hold, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip("\r\n "):
            yield number, line.removesuffix("\r").split("\t")


def _csv_rows(name: str, text: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader, number = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        for row in reader:
            if row:
                yield number, row
            number = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{name} line {number}: {error}; close every quote") from error


def _from_rows(name: str, rows: Iterator[tuple[int, list[str]]], header: Sequence[str], skip_ragged: bool) -> Table:
    """Return the table of rows, the first of which has the columns' names unless `header` does."""
    names: Sequence[str] = header
    lines: list[int] = []
    found: list[list[str]] = []
    for number, row in rows:
        if not names:
            names = row
            twice = sorted({column for column in row if row.count(column) > 1})
            require(not twice, f"{name} line {number}: two columns are called {', '.join(twice)}")
            continue
        if skip_ragged and len(row) != len(names):
            continue
        told = f"{name} line {number}: {len(row)} columns, where {len(names)} are due ({', '.join(names)})"
        require(len(row) == len(names), told)
        lines.append(number)
        found.append(row)
    columns = list(zip(*found, strict=True)) if found else [()] * len(names)
    return Table(name, dict(zip(names, columns, strict=True)), lines)


def _from_objects(name: str, text: str) -> Table:
    objects = {number: line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    found = [line_object(line, f"{name} line {number}").values for number, line in objects.items()]
    names = dict.fromkeys(key for fields in found for key in fields)
    return Table(name, {key: [fields.get(key) for fields in found] for key in names}, list(objects))


def numbered_header(path: str, cache_directory: str) -> Sequence[str]:
    """Return names of the columns of a file without header: their numbers from 1, as many as its first row has."""
    local = seekable(os.path.expanduser(path), cache_directory)
    with open(local, encoding="utf-8-sig", errors="replace", newline="") as file:
        first = file.readline()
    rows = _csv_rows(path, first) if _suffix(path) == ".csv" else _tsv_rows(first)
    _, row = next(rows, (1, [""]))
    return [str(number) for number in range(1, len(row) + 1)]
