"""GLUE's files and tables as labelled examples."""

import math

import numpy as np
import pytest

from lin_jax.data.examples import class_names, labels_of, open_examples, test_names, validation_names
from lin_jax.data.glue import GLUE
from lin_jax.settings.base import ConfigError
from lin_jax.settings.data import DataConfig

test_names.__test__ = False  # pytest would take it for a test.

MNLI = "index\tpromptID\tpairID\tgenre\tp1\tp2\tq1\tq2\tsentence1\tsentence2\tlabel1\tgold_label\n"
ROW = "0\t1\t2\tg\t(a)\t(b)\t(c)\t(d)\tA man\tA dog\tneutral\t{}\n"
# As the official files are written: headers or none, columns in their order.
FILES = {
    "CoLA/train.tsv": "gj04\t1\t\tOne more.\ngj04\t0\t*\tThey drank the pub.\n",
    "CoLA/dev.tsv": 'gj04\t1\t\tHe said "no.\n',
    "CoLA/test.tsv": "index\tsentence\n0\tBill whistled.\n",
    "MRPC/train.tsv": '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said "x\tShe said\n',
    "QQP/train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhat?\tWhy?\t0\n4\tbroken\n",
    "MNLI/train.tsv": MNLI + ROW.format("contradiction"),
    "MNLI/dev_matched.tsv": MNLI + ROW.format("neutral"),
    "MNLI/dev_mismatched.tsv": MNLI + ROW.format("entailment"),
    "STS-B/train.tsv": "index\tsentence1\tsentence2\tscore\n0\tA\tB\t3.250\n",
}
WANTED = {
    ("cola", "train"): (["One more.", "They drank the pub."], None, [1, 0]),
    ("cola", ""): (['He said "no.'], None, [1]),
    ("cola", "CoLA"): (["Bill whistled."], None, [-1]),
    ("mrpc", "train"): (['He said "x'], ["She said"], [1]),
    ("qqp", "train"): (["What?"], ["Why?"], [0]),
    ("mnli", "train"): (["A man"], ["A dog"], [2]),
    ("mnli", ""): (["A man"], ["A dog"], [1]),
    ("mnli", "mismatched"): (["A man"], ["A dog"], [0]),
    ("stsb", "train"): (["A"], ["B"], [3.25]),
}


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    root = tmp_path_factory.mktemp("glue")
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return str(root)


@pytest.mark.parametrize(("task", "split"), WANTED)
def test_official_files_are_read(glue, task, split):
    config = DataConfig(source="glue", task=task, path=(glue,))
    examples = open_examples(config, split)
    first, second, labels = WANTED[task, split]
    assert (list(examples.first), examples.second and list(examples.second)) == (first, second)
    np.testing.assert_array_equal(labels_of(examples, config, class_names(config)), labels)


def test_every_task_has_what_the_rest_needs(glue):
    assert set(GLUE) == set(DataConfig.__dataclass_fields__["task"].type.__args__)
    assert all(len(task.classes) == len(task.values) for task in GLUE.values())
    config = DataConfig(source="glue", task="mnli", path=(glue,))
    assert (validation_names(config), test_names(config)) == (("", "mismatched"), ())
    assert test_names(DataConfig(source="glue", task="cola", path=(glue,))) == ("CoLA",)


def table(tmp_path, text, name="a.tsv", **settings):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return DataConfig(source="table", path=(str(tmp_path / name),), **settings)


def test_tables_have_their_own_classes_and_hold_some_rows_out(tmp_path):
    config = table(tmp_path, "text\tlabel\n" + "".join(f"t{n}\t{'ba'[n % 2]}\n" for n in range(20)))
    assert class_names(config) == ("a", "b")
    train, held = open_examples(config, "train"), open_examples(config, "")
    assert len(train) == 19 and sorted([*train.first, *held.first]) == sorted(f"t{n}" for n in range(20))
    # Numbers are sorted as numbers; a file without header has them for names of columns.
    assert class_names(table(tmp_path, "label\ttext\n10\tx\n9\ty\n9\ty\n", validation_fraction=0.1)) == ("9", "10")
    config = table(tmp_path, "10\tx\n9\ty\n", text_field="2", label_field="1", validation_fraction=0.5)
    assert open_examples(config, "train").first == ["x"]
    config = table(tmp_path, "text\tlabel\na\t1.5\nb\t2\nb\t2\n", label_kind="number")
    assert labels_of(open_examples(config, "train"), config, ()).dtype == np.float32
    # Classes by number, and test rows without labels.
    config = table(tmp_path, '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n', "a.jsonl")
    np.testing.assert_array_equal(sorted(labels_of(open_examples(config, "train"), config, ("no", "yes"))), [1])
    test = table(tmp_path, "text\nx\n", "test.tsv", test_path=(str(tmp_path / "test.tsv"),))
    assert labels_of(open_examples(test, "test"), test, ("a",)).tolist() == [-1] and not math.isnan(0)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("text\tlabel\na\tx\nb\tz\n", {}, 'line 3: unknown label "z"; there are x, y'),
        ("text\tlabel\na\tx\nb\tz\n", {"label_kind": "number"}, 'line 2: the label must be a number, but is "x"'),
        ("text\tlabel\na\tx\n", {"text_field": "body"}, "has no column 'body'; set data.text_field"),
        ("text\tother\na\tx\n", {}, "has no column 'label'; set data.label_field to one of text, other"),
        ("text\tlabel\na\tx\nb\t\n", {}, 'line 3: label is ""'),
        ("text\tlabel\n", {}, "has no rows"),
        ("", {}, "has no rows"),
        ("text\tlabel\na\tx\n", {}, "too few to hold some out"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, text, settings, message):
    config = table(tmp_path, text, **settings)
    with pytest.raises(ConfigError) as error:
        for split in ("train", ""):
            labels_of(open_examples(config, split), config, ("x", "y"))
    assert message in str(error.value)
