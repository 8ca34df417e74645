"""Settings of the text."""

import dataclasses
from typing import Literal

from lin_jax.settings.base import require, require_at_least_zero, require_paths, require_positive, setting
from lin_jax.settings.typed import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Where text comes from and how it becomes rows of tokens."""

    source: Literal["tfds", "text", "stdlib", "glue", "table"] = setting(
        "stdlib",
        "tfds: a prepared TensorFlow dataset; text: files; stdlib: this Python's own library source, always there; "
        "labelled examples: glue, or table for any .tsv .csv .jsonl",
    )
    path: tuple[str, ...] = setting(
        (),
        "source=text: files or globs of .txt .jsonl, plain or .gz .zst; table: files; glue: the directory with "
        "SST-2/train.tsv and so on, empty for TensorFlow Datasets",
    )
    validation_path: tuple[str, ...] = setting(
        (), "source=text, table: files held out; empty holds out validation_fraction"
    )
    test_path: tuple[str, ...] = setting((), "source=table: files to predict labels for, which they need not have")
    task: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"] = setting(
        "sst2", "source=glue: the task of GLUE"
    )
    second_field: str = setting("", "source=table: column of the second text of a pair; empty: texts stand alone")
    target_field: str = setting(
        "", "source=table, tfds: field of the text that objective=seq2seq writes; text_field is its source"
    )
    target_length: int = setting(
        128, "objective=seq2seq: tokens in a target; a source has sequence_length of them", most=2**24
    )
    prefix: str = setting("", "objective=seq2seq: what every source begins with, such as 'summarize: '")
    label_field: str = setting(
        "label", "source=table: column of the label; files without header have numbers for names: 1, 2, ..."
    )
    label_kind: Literal["class", "number"] = setting("class", "source=table: what labels are")
    padding: Literal["bucket", "fixed"] = setting(
        "bucket",
        "rows of examples are filled up to the next of a few lengths, so that little is computed for nothing, or all "
        "to sequence_length",
    )
    validation_fraction: float = setting(
        0.05, "part of the documents held out where the source has no validation split"
    )
    tfds_name: str = setting("wiki40b/en", "source=tfds: dataset/config")
    tfds_directory: str | None = setting(None, "source=tfds: where it was prepared; None is ~/tensorflow_datasets")
    train_split: str = setting("train", "source=tfds: split to train on")
    validation_split: str = setting("validation", "source=tfds: split to evaluate on")
    text_field: str = setting("text", "field that holds the text in .jsonl lines, TFDS examples and tables")
    separator: str | None = setting(
        None, "source=text: string between documents of a plain text file; None makes a file one document"
    )
    cache_directory: str = setting(
        "~/.cache/lin_jax", "source=text: where .gz and .zst files are kept uncompressed, and offsets of large files"
    )
    encoding_errors: Literal["replace", "strict"] = setting(
        "strict", "bytes that are not UTF-8: refuse the file, or replace them by U+FFFD"
    )
    tokenizer: str = setting(
        "bytes",
        "bytes; train (a byte-level BPE is learned from the corpus); checkpoint (that of finetune.checkpoint); or a "
        "Hugging Face directory or name",
    )
    tokenizer_vocabulary: int = setting(4096, "tokenizer=train: size of the learned vocabulary", most=2**24)
    sequence_length: int = setting(1024, "tokens T in a row", most=2**24)
    batch_size: int = setting(8, "rows in an update, over all devices and microbatches", most=2**20)
    packing: Literal["concatenate", "segments"] = setting(
        "concatenate",
        "concatenate: rows are cut from one stream of documents, and attention crosses their borders; "
        "segments: documents never see each other",
    )
    seed: int = setting(0, "seed of the order of documents", most=2**32 - 1)

    def _check(self) -> None:
        require_positive(self, "sequence_length", "batch_size", "tokenizer_vocabulary", "target_length")
        require_at_least_zero(self, "seed")
        require_paths(
            self, "path", "validation_path", "test_path", "tfds_name", "tfds_directory", "cache_directory", "tokenizer"
        )
        require(
            0 < self.validation_fraction < 1,
            f"validation_fraction must lie between 0 and 1, but is {self.validation_fraction}",
        )
        require(
            self.source not in ("text", "table") or bool(self.path or self.validation_path or self.test_path),
            "path is empty: give files with --config.data.path=FILE_OR_GLOB",
        )
        require(self.separator != "", "separator must not be the empty string; None makes a file one document")
