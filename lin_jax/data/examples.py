"""Labelled examples: one text or two, and a class or a number, of GLUE or any table."""

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lin_jax.data.glue import GLUE, GlueTask
from lin_jax.data.holdout import held_out
from lin_jax.data.tables import Table, numbered_header, read_table
from lin_jax.paths import is_remote
from lin_jax.settings.base import ConfigError, require
from lin_jax.settings.data import DataConfig
from lin_jax.settings.typed import shown

if TYPE_CHECKING:
    from lin_jax.data.tfds_source import TfdsPairs

TRAIN = "train"


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """The examples of a split.

    Attributes:
        name: the file or dataset, for messages.
        first: the first text of each.
        second: the second, or None where there is one text only.
        labels: the label of each as it was written; None where the split has none.
        lines: the number of each in its file, for messages.
    """

    name: str
    first: Sequence[str]
    second: Sequence[str] | None
    labels: Sequence[str] | None
    lines: Sequence[int]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.first)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum of texts and labels."""
        found = hashlib.sha256()
        for column in (self.first, self.second, self.labels):
            for text in column or ():
                found.update(text.encode("utf-8", "surrogatepass") + b"\0")
            found.update(b"\1")
        return found.hexdigest()[:16]

    def classes(self, names: Sequence[str], values: Sequence[str]) -> np.ndarray:
        """Return the number of each label's class, int32.

        Args:
            names: of the classes, in their order.
            values: other spellings of them, in the same order, or none. Without, and where no class is called by a
                number, labels may be the classes' numbers.

        Raises:
            ConfigError: a label is of no class; with its line.
        """
        numbers = {name: number for number, name in enumerate(values or ())} | {
            name: number for number, name in enumerate(names)
        }
        if not values and not any(_is_whole(name) for name in names):
            numbers |= {str(number): number for number in range(len(names))}
        for row, label in enumerate(self.labels or ()):
            told = ", ".join(values or names)
            require(label in numbers, f"{self.where(row)}: unknown label {shown(label)}; there are {told}")
        return np.array([numbers[label] for label in self.labels or ()], np.int32)

    def numbers(self) -> np.ndarray:
        """Return the labels as numbers, float32; raise `ConfigError` for other labels, with the line."""
        return np.array([self._number(row, label) for row, label in enumerate(self.labels or ())], np.float32)

    def _number(self, row: int, label: str) -> float:
        try:
            value = float(label)
        except ValueError:
            value = math.nan
        told = f"{self.where(row)}: the label must be a number, but is {shown(label)}"
        require(math.isfinite(value), f"{told}; set data.label_kind=class for classes")
        return value

    def where(self, row: int) -> str:
        """Return the place of an example, for messages."""
        return f"{self.name} line {self.lines[row]}"

    def take(self, rows: Sequence[int] | np.ndarray) -> "Examples":
        """Return some of the examples."""
        pick = lambda column: None if column is None else [column[int(row)] for row in rows]  # noqa: E731
        return Examples(self.name, pick(self.first) or [], pick(self.second), pick(self.labels), pick(self.lines) or [])


def glue_task(config: DataConfig) -> GlueTask | None:
    """Return the task of GLUE that the data are of; None for others."""
    return GLUE[config.task] if config.source == "glue" else None


def are_numbers(config: DataConfig) -> bool:
    """Return whether labels are numbers, not classes."""
    glue = glue_task(config)
    return not glue.classes if glue else config.label_kind == "number"


def validation_names(config: DataConfig) -> tuple[str, ...]:
    """Return the names of the validation sets, the first of which is empty."""
    glue = glue_task(config)
    return tuple(glue.validation) if glue else ("",)


def test_names(config: DataConfig) -> tuple[str, ...]:
    """Return the names of the test sets that are there: of GLUE, those of the files that its server takes."""
    glue = glue_task(config)
    if glue is None:
        return ("test",) if config.test_path else ()
    if not config.path:
        return tuple(glue.tests)
    return tuple(name for name, file in glue.tests.items() if os.path.isfile(_glue_file(config, file)))


def class_names(config: DataConfig) -> tuple[str, ...]:
    """Return the names of the classes, none where labels are numbers: of GLUE as published, of tables as they stand.

    Those of a table are sorted, by size where all are whole numbers.
    """
    glue = glue_task(config)
    if glue is not None:
        return glue.classes
    if are_numbers(config):
        return ()
    found = set(_labels_of(open_examples(config, TRAIN)))
    return tuple(sorted(found, key=int) if all(map(_is_whole, found)) else sorted(found))


def labels_of(examples: Examples, config: DataConfig, names: Sequence[str]) -> np.ndarray:
    """Return the labels of examples: numbers of classes, int32, or numbers, float32; -1 or NaN where there is none."""
    if examples.labels is None:
        return np.full(len(examples), math.nan if are_numbers(config) else -1, _dtype(config))
    if are_numbers(config):
        return examples.numbers()
    glue = glue_task(config)
    return examples.classes(names, glue.values if glue else ())


def _dtype(config: DataConfig) -> Any:
    return np.float32 if are_numbers(config) else np.int32


def open_examples(config: DataConfig, split: str) -> Examples:
    """Return the examples of a split.

    Args:
        config: the data.
        split: "train", or the name of a validation set or test set, see `validation_names` and `test_names`.

    Raises:
        ConfigError: they are not there, damaged, or none; with the file and the line.
    """
    found = _open_glue(config, split) if config.source == "glue" else _open_table(config, split)
    require(len(found) > 0, f"{found.name} has no examples; give others")
    wants_labels = split == TRAIN or split in validation_names(config)
    require(found.labels is not None or not wants_labels, f"{found.name} has no labels")
    return found


def open_pairs(config: DataConfig, split: str) -> "Examples | TfdsPairs":
    """Return the sources and targets of a split, as the first and the second texts of examples without labels.

    Of GLUE they are what T5 was trained with: the task's name, and each text behind its own name; and the name of the
    class, or the number in steps of a fifth (Raffel et al., 2020, appendix D).

    Args:
        config: the data: GLUE, tables, whose columns are `text_field` and `target_field`, or a prepared TensorFlow
            dataset.
        split: "train", a name of `validation_names`, or "test" for the files of `test_path`.

    Raises:
        ConfigError: they are not there, damaged, or none; with the file and the line.
    """
    if config.source == "glue":
        return _as_texts(open_examples(config, split), GLUE[config.task], config.task)
    require(bool(config.target_field), "data.target_field is empty: name the column of what is to be written")
    if config.source == "tfds":
        from lin_jax.data.tfds_source import tfds_pairs

        return tfds_pairs(config, "train" if split == TRAIN else "validation")
    found = _open_table(dataclasses.replace(config, second_field=config.target_field, label_field=""), split)
    require(len(found) > 0, f"{found.name} has no examples; give others")
    return found


def _as_texts(examples: Examples, glue: GlueTask, name: str) -> Examples:
    columns = dict(zip(glue.tfds_texts, filter(None, (examples.first, examples.second)), strict=True))
    parts = [[f"{field}: {text}" for text in columns[field]] for field in sorted(columns)]
    sources = [" ".join((name, *texts)) for texts in zip(*parts, strict=True)]
    if glue.classes:
        targets = [glue.classes[label] for label in examples.classes(glue.classes, glue.values)]
    else:
        targets = [f"{round(5 * float(number)) / 5:.1f}" for number in examples.numbers()]
    return Examples(examples.name, sources, targets, None, examples.lines)


def _labels_of(examples: Examples) -> Sequence[str]:
    assert examples.labels is not None
    return examples.labels


def _is_whole(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdigit()


def _open_glue(config: DataConfig, split: str) -> Examples:
    glue = GLUE[config.task]
    file = "train.tsv" if split == TRAIN else {**glue.validation, **glue.tests}[split]
    if not config.path:
        from lin_jax.data.tfds_source import tfds_examples

        return tfds_examples(config, glue, glue.tfds_splits[file])
    is_test = split in glue.tests
    path = _glue_file(config, file)
    header = () if is_test else glue.header
    table = read_table(path, config.cache_directory, header=header, skip_ragged=glue.skip_ragged)
    return _from_table(table, config, glue.texts, "data.task", glue.label, "data.task", may_lack_label=is_test)


def _glue_file(config: DataConfig, file: str) -> str:
    """Return a file's path; `data.path` is the directory of the task or the one that holds it."""
    require(len(config.path) == 1, "data.path must be one directory for data.source=glue")
    root = os.path.expanduser(config.path[0])
    directory = os.path.join(root, GLUE[config.task].directory)
    return os.path.join(directory if os.path.isdir(directory) or is_remote(root) else root, file)


def _open_table(config: DataConfig, split: str) -> Examples:
    if split == "test":
        return _read_tables(config, config.test_path, may_lack_label=True)
    if config.validation_path:
        return _read_tables(config, config.path if split == TRAIN else config.validation_path)
    whole = _read_tables(config, config.path)
    require(len(whole) > 1, f"{whole.name} has {len(whole)} examples, too few to hold some out")
    return whole.take(np.flatnonzero(held_out(len(whole), config.validation_fraction) == (split != TRAIN)))


def _read_tables(config: DataConfig, paths: Sequence[str], *, may_lack_label: bool = False) -> Examples:
    require(bool(paths), "data.path is empty: give tables with --config.data.path=FILE")
    texts = [config.text_field, *filter(None, [config.second_field])]
    by_number = all(name.isdigit() for name in (*texts, *filter(None, [config.label_field])))
    # Sources and targets have no label.
    may_lack_label = may_lack_label or not config.label_field
    second = "data.second_field" if config.label_field else "data.target_field"
    parts = []
    for path in paths:
        header = numbered_header(path, config.cache_directory) if by_number else ()
        table = read_table(path, config.cache_directory, header=header)
        fields = (f"data.text_field and {second}", config.label_field, "data.label_field")
        parts.append(_from_table(table, config, texts, *fields, may_lack_label=may_lack_label))
    return _joined(parts)


def _from_table(
    table: Table,
    config: DataConfig,
    texts: Sequence[str],
    text_setting: str,
    label: str,
    label_setting: str,
    *,
    may_lack_label: bool,
) -> Examples:
    require(bool(table.lines), f"{table.name} has no rows; give others")
    columns = [table.texts(name, text_setting) for name in texts]
    labels = None
    if not may_lack_label or label in table.columns:
        found = table.column(label, label_setting)
        labels = [_spelled(value, table, row, label) for row, value in enumerate(found)]
    return Examples(table.name, columns[0], columns[1] if len(columns) > 1 else None, labels, table.lines)


def _spelled(value: Any, table: Table, row: int, label: str) -> str:
    """Return a label as text; JSON also has numbers and truth values."""
    known = isinstance(value, (int, float)) or (isinstance(value, str) and bool(value.strip()))
    require(known, f"{table.where(row)}: {label} is {shown(value)}; a label is a text or a number")
    return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def _joined(parts: Sequence[Examples]) -> Examples:
    if len(parts) == 1:
        return parts[0]
    has_labels = {part.labels is None for part in parts}
    if len(has_labels) > 1:
        raise ConfigError(f"{parts[0].name} and {parts[1].name}: some files have labels and some have none")
    join = lambda columns: [value for column in columns for value in column]  # noqa: E731
    return Examples(
        parts[0].name,
        join(part.first for part in parts),
        None if parts[0].second is None else join(part.second or () for part in parts),
        None if parts[0].labels is None else join(part.labels or () for part in parts),
        join(part.lines for part in parts),
    )


def spellings(config: DataConfig, names: Sequence[str]) -> Mapping[int, str]:
    """Return how predictions of classes are spelled in files: as the data spell them."""
    glue = glue_task(config)
    return dict(enumerate(glue.values if glue and glue.values else names))
