"""The tasks of GLUE (Wang et al., 2019), as data: their files, columns, classes, and what GLUE measures each by.

Classes are in the order that TensorFlow Datasets numbers them in; `values` says how the files, and the server that
takes predictions, spell them.
"""

from collections.abc import Mapping
from typing import NamedTuple


class GlueTask(NamedTuple):
    """A task of GLUE.

    Attributes:
        directory: with its files in the official layout.
        texts: the columns of the texts, one or two.
        label: the column of the label; test files have none.
        classes: names of the classes; empty: the label is a number.
        values: how files spell the classes.
        measure: what GLUE measures it by, of the measures of `lin_jax.tasks.classification`.
        tfds_texts: the texts' names in TensorFlow Datasets.
        header: names of columns where training and validation files have none.
        validation: the file of each validation set; the first has no name.
        tests: the file of each test set, by the name of the file of predictions that the server takes.
        tfds_splits: splits of TensorFlow Datasets by file.
        skip_ragged: whether training files hold damaged rows, which everybody leaves out.
    """

    directory: str
    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    values: tuple[str, ...]
    measure: str
    tfds_texts: tuple[str, ...]
    header: tuple[str, ...] = ()
    validation: Mapping[str, str] = {"": "dev.tsv"}
    tests: Mapping[str, str] = {}
    tfds_splits: Mapping[str, str] = {"train.tsv": "train", "dev.tsv": "validation", "test.tsv": "test"}
    skip_ragged: bool = False


_BINARY = ("0", "1")
_PAIR = ("sentence1", "sentence2")
_ENTAILS = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")

GLUE: Mapping[str, GlueTask] = {
    "cola": GlueTask(
        "CoLA",
        ("sentence",),
        "label",
        ("unacceptable", "acceptable"),
        _BINARY,
        "matthews",
        ("sentence",),
        header=("source", "label", "mark", "sentence"),
        tests={"CoLA": "test.tsv"},
    ),
    "sst2": GlueTask(
        "SST-2",
        ("sentence",),
        "label",
        ("negative", "positive"),
        _BINARY,
        "accuracy",
        ("sentence",),
        tests={"SST-2": "test.tsv"},
    ),
    "mrpc": GlueTask(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        ("not_equivalent", "equivalent"),
        _BINARY,
        "f1",
        _PAIR,
        tests={"MRPC": "test.tsv"},
    ),
    "qqp": GlueTask(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("not_duplicate", "duplicate"),
        _BINARY,
        "f1",
        ("question1", "question2"),
        tests={"QQP": "test.tsv"},
        skip_ragged=True,
    ),
    "stsb": GlueTask("STS-B", _PAIR, "score", (), (), "correlation", _PAIR, tests={"STS-B": "test.tsv"}),
    "mnli": GlueTask(
        "MNLI",
        _PAIR,
        "gold_label",
        _MNLI,
        _MNLI,
        "accuracy",
        ("premise", "hypothesis"),
        validation={"": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"},
        tests={"MNLI-m": "test_matched.tsv", "MNLI-mm": "test_mismatched.tsv"},
        tfds_splits={
            "train.tsv": "train",
            "dev_matched.tsv": "validation_matched",
            "dev_mismatched.tsv": "validation_mismatched",
            "test_matched.tsv": "test_matched",
            "test_mismatched.tsv": "test_mismatched",
        },
    ),
    "qnli": GlueTask(
        "QNLI",
        ("question", "sentence"),
        "label",
        _ENTAILS,
        _ENTAILS,
        "accuracy",
        ("question", "sentence"),
        tests={"QNLI": "test.tsv"},
    ),
    "rte": GlueTask("RTE", _PAIR, "label", _ENTAILS, _ENTAILS, "accuracy", _PAIR, tests={"RTE": "test.tsv"}),
    "wnli": GlueTask(
        "WNLI",
        _PAIR,
        "label",
        ("not_entailment", "entailment"),
        _BINARY,
        "accuracy",
        _PAIR,
        tests={"WNLI": "test.tsv"},
    ),
}
