"""Prepared TensorFlow datasets as a source, read without TensorFlow."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds
import tensorflow_datasets.summarization  # noqa: F401  (registers its builders)
import tensorflow_datasets.text  # noqa: F401  (registers its builders)

from lin_jax.data.examples import Examples
from lin_jax.data.glue import GlueTask
from lin_jax.data.holdout import held_out
from lin_jax.data.index import without_surrogates
from lin_jax.settings.base import ConfigError, require
from lin_jax.settings.data import DataConfig

NEED_TENSORFLOW = ("wiki40b", "c4", "pg19", "lm1b", "cnn_dailymail")
_DEFAULT_VALIDATION = DataConfig.__dataclass_fields__["validation_split"].default


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
    """The text of examples of a TFDS data source."""

    config: DataConfig
    examples: Sequence[Any]
    chosen: np.ndarray | range  # the examples of this split

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.chosen)

    def __getitem__(self, index: int) -> str:
        """The text of an example."""
        example = int(self.chosen[index])
        text = self.examples[example][self.config.text_field]
        where = f"{self.config.tfds_name} example {example}"
        require(isinstance(text, (str, bytes)), f"{where}: the field {self.config.text_field} is not text")
        if isinstance(text, str):
            return without_surrogates(text, self.config, where)
        try:
            return text.decode("utf-8", errors=self.config.encoding_errors)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where}: {error}; set data.encoding_errors=replace") from error

    def ends(self, index: int) -> bool:
        """Whether a piece is the last one of its document: examples are never cut."""
        return True

    @property
    def fingerprint(self) -> str:
        """The number of examples; a prepared dataset of a version does not change."""
        return f"{len(self.chosen)} of {len(self.examples)} examples"


def open_tfds(config: DataConfig, split: Literal["train", "validation"]) -> TfdsSource:
    """The examples of a split; part of the training split where the dataset has no validation split.

    Raises:
        ConfigError: the dataset is unknown or not prepared, or has no such split or text field.
    """
    builder = _prepared_builder(config)
    _check_text_field(builder, config)
    if config.validation_split == _DEFAULT_VALIDATION and _DEFAULT_VALIDATION not in builder.info.splits:
        return _held_out(builder, config, split)
    _check_apart(builder, config)
    examples = _examples(builder, config, config.train_split if split == "train" else config.validation_split)
    return TfdsSource(config, examples, range(len(examples)))


@dataclasses.dataclass(frozen=True)
class TfdsPairs:
    """Sources and targets of a TFDS data source, read when they are asked for; see `Examples`."""

    first: TfdsSource
    second: TfdsSource

    @property
    def name(self) -> str:
        """The dataset."""
        return self.first.config.tfds_name

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.first)

    @property
    def fingerprint(self) -> str:
        """That of the examples, and the names of both fields."""
        return f"{self.first.fingerprint}, {self.first.config.text_field} to {self.second.config.text_field}"

    def take(self, rows: Sequence[int] | np.ndarray) -> Examples:
        """Return some of the pairs."""
        first, second = ([source[int(row)] for row in rows] for source in (self.first, self.second))
        return Examples(self.name, first, second, None, [int(row) for row in rows])


def tfds_pairs(config: DataConfig, split: Literal["train", "validation"]) -> TfdsPairs:
    """Return the pairs of a split; see `open_tfds`."""
    target = dataclasses.replace(config, text_field=config.target_field)
    found = TfdsPairs(open_tfds(config, split), open_tfds(target, split))
    require(len(found) > 0, f"{found.name} has no examples; give others")
    return found


def _held_out(builder: Any, config: DataConfig, split: str) -> TfdsSource:
    examples = _examples(builder, config, config.train_split)
    require(
        len(examples) > 1,
        f"{config.tfds_name}: {config.train_split} has {len(examples)} examples, too few to hold some out",
    )
    mask = held_out(len(examples), config.validation_fraction) == (split == "validation")
    return TfdsSource(config, examples, np.flatnonzero(mask))


def _prepared_builder(config: DataConfig) -> Any:
    try:
        builder = tfds.builder(config.tfds_name, data_dir=config.tfds_directory)
    except ValueError as error:  # DatasetNotFoundError among them; their messages list every dataset there is
        reason = str(error).splitlines()[0]
        raise ConfigError(f"data.tfds_name: {config.tfds_name} cannot be opened: {reason}") from error
    require(
        builder.is_prepared(), f"{config.tfds_name} is not prepared in {builder.data_dir}: {_how_to_prepare(config)}"
    )
    return builder


def _how_to_prepare(config: DataConfig) -> str:
    """What to run; TFDS' own command line needs TensorFlow even where preparing does not."""
    directory = "" if config.tfds_directory is None else f", data_dir={config.tfds_directory!r}"
    first = ""
    if config.tfds_name.split("/")[0].split(":")[0] in NEED_TENSORFLOW:
        first = "pip install tensorflow apache-beam (preparing it needs them, reading doesn't), then "
    return (
        f'run {first}python -c "import tensorflow_datasets as tfds, tensorflow_datasets.text, '
        f"tensorflow_datasets.summarization; tfds.builder('{config.tfds_name}', file_format='array_record'{directory})"
        '.download_and_prepare()", or set data.tfds_directory to where it was prepared'
    )


def _check_text_field(builder: Any, config: DataConfig) -> None:
    fields = list(builder.info.features)
    told = "data.text_field and data.target_field" if config.target_field else "data.text_field"
    require(
        config.text_field in fields,
        f"{config.tfds_name} has no field {config.text_field!r}; set {told} to one of {', '.join(fields)}",
    )


def _examples(builder: Any, config: DataConfig, split: str) -> Sequence[Any]:
    _split_info(builder, config, split)
    try:
        return builder.as_data_source(split)
    except NotImplementedError as error:
        raise ConfigError(
            f"{config.tfds_name} is stored as {builder.info.file_format.value}, which has no random access: "
            f"{_how_to_prepare(config)}"
        ) from error


def _split_info(builder: Any, config: DataConfig, split: str) -> Any:
    try:
        return builder.info.splits[split]
    except ValueError as error:
        splits = ", ".join(builder.info.splits)
        raise ConfigError(f"{config.tfds_name} has no split {split!r}; there are {splits}") from error


def _check_apart(builder: Any, config: DataConfig) -> None:
    """Refuse splits that share examples, such as train and train[:5%]."""
    train, validation = (
        [
            (part.filename, part.skip, part.skip + part.take)
            for part in _split_info(builder, config, name).file_instructions
        ]
        for name in (config.train_split, config.validation_split)
    )
    shared = any(
        file == other and start < end and begin < stop
        for file, start, stop in train
        for other, begin, end in validation
    )
    require(
        not shared,
        f"{config.tfds_name}: data.train_split={config.train_split} and "
        f"data.validation_split={config.validation_split} share examples; try {config.train_split}[:95%] and [95%:]",
    )


def tfds_examples(config: DataConfig, glue: GlueTask, split: str) -> Examples:
    """Return a split of `glue/TASK`; labels are numbers of classes, which are spelled as GLUE's files spell them."""
    config = dataclasses.replace(config, tfds_name=f"glue/{config.task}", text_field=glue.tfds_texts[0])
    builder = _prepared_builder(config)
    examples = list(_examples(builder, config, split))
    columns = [[example[name].decode("utf-8") for example in examples] for name in glue.tfds_texts]
    found = [example["label"] for example in examples]
    labels: list[str] | None = [glue.values[int(label)] if glue.values else f"{label:g}" for label in found]
    if split.startswith("test"):  # All are -1 there.
        labels = None
    name = f"{config.tfds_name} {split}"
    return Examples(name, columns[0], columns[1] if len(columns) > 1 else None, labels, range(1, len(examples) + 1))
