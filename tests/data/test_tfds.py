"""TFDS: a dataset written and read without TensorFlow."""

import dataclasses
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lin_jax.data import tfds_source
from lin_jax.data.examples import open_examples, open_pairs
from lin_jax.data.sources import open_source
from lin_jax.experiment import ConfigError, DataConfig

TEXTS = {"train": [f"training text {number} é" for number in range(50)], "test": ["test one", "test two"]}


class TinyTexts(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in TEXTS}

    def _generate_examples(self, split):
        for number, text in enumerate(TEXTS[split]):
            yield number, {"text": text, "label": number}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("tfds"))
    TinyTexts(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


def read(directory, split, **settings):
    source = open_source(DataConfig(source="tfds", tfds_name="tiny_texts", tfds_directory=directory, **settings), split)
    return [source[index] for index in range(len(source))]


def test_splits_are_read(directory):
    assert sorted(read(directory, "train", validation_split="test")) == sorted(TEXTS["train"])
    assert sorted(read(directory, "validation", validation_split="test")) == TEXTS["test"]
    assert "tensorflow" not in sys.modules


def test_some_are_held_out_where_there_is_no_validation_split(directory):
    train = read(directory, "train", validation_fraction=0.2)
    validation = read(directory, "validation", validation_fraction=0.2)
    assert len(validation) == 10
    assert sorted(train + validation) == sorted(TEXTS["train"])


def test_parts_of_splits(directory):
    settings = {"train_split": "train[:90%]", "validation_split": "train[90%:]"}
    train, validation = (read(directory, split, **settings) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (45, 5)
    assert sorted(train + validation) == sorted(TEXTS["train"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_split": "nothing"}, r"has no split 'nothing'; there are .*test"),
        ({"text_field": "body"}, r"has no field 'body'; set data\.text_field to one of .*text"),
        ({"validation_split": "train[:5%]"}, r"train and data\.validation_split=train\[:5%\] share examples"),
        ({"tfds_name": "no_such_set"}, r"data\.tfds_name: no_such_set cannot be opened"),
        ({"tfds_name": "wiki40b/en"}, r"not prepared in .*pip install tensorflow apache-beam.*builder\('wiki40b/en'"),
        ({"tfds_name": "glue/sst2"}, r"not prepared in .*: run python .*builder\('glue/sst2', file_format='array_rec"),
    ],
)  # fmt: skip
def test_errors(directory, settings, message):
    settings = {"tfds_name": "tiny_texts", "tfds_directory": directory, **settings}
    with pytest.raises(ConfigError, match=message) as caught:
        open_source(DataConfig(source="tfds", **settings), "train")
    assert "\n" not in str(caught.value)


def test_a_field_that_is_not_text(directory):
    with pytest.raises(ConfigError, match=r"tiny_texts example \d+: the field label is not text"):
        read(directory, "train", text_field="label")


def test_bytes_that_are_not_utf8(directory):
    config = DataConfig(source="tfds", tfds_name="tiny_texts", tfds_directory=directory)
    source = open_source(config, "train")
    object.__setattr__(source, "examples", [{"text": b"a \xff"}] * 50)
    with pytest.raises(ConfigError, match=r"tiny_texts example 0: .*data\.encoding_errors=replace"):
        source[0]


def test_glue_is_read_by_its_names_there(monkeypatch):
    rows = [{"sentence1": b"A", "sentence2": "é".encode(), "label": label} for label in (1, 0)]
    monkeypatch.setattr(tfds_source, "_prepared_builder", lambda config: config.tfds_name)
    monkeypatch.setattr(tfds_source, "_examples", lambda builder, config, split: rows if builder == "glue/rte" else [])
    config = DataConfig(source="glue", task="rte")
    train, test = open_examples(config, "train"), open_examples(config, "RTE")
    assert (train.first, train.second, train.labels) == (["A", "A"], ["é", "é"], ["not_entailment", "entailment"])
    assert test.labels is None and len(test) == 2


class TinyPairs(TinyTexts):
    """A target beside each text."""

    def _info(self):
        features = tfds.features.FeaturesDict({"article": tfds.features.Text(), "highlights": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _generate_examples(self, split):
        for number, text in enumerate(TEXTS[split]):
            yield number, {"article": text, "highlights": text[-2:]}


def test_pairs_are_read_when_they_are_asked_for(tmp_path):
    TinyPairs(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    settings = {"tfds_name": "tiny_pairs", "tfds_directory": str(tmp_path), "validation_split": "test"}
    config = DataConfig(source="tfds", text_field="article", target_field="highlights", **settings)
    pairs = open_pairs(config, "train")
    assert len(pairs) == 50 and "article to highlights" in pairs.fingerprint
    taken = pairs.take([3, 0, 49])
    assert list(taken.second) == [text[-2:] for text in taken.first] and len(set(taken.first)) == 3
    assert set(open_pairs(config, "").take([0, 1]).first) == set(TEXTS["test"])
    with pytest.raises(
        ConfigError, match="has no field 'summary'; set data.text_field and data.target_field to one of"
    ):
        open_pairs(dataclasses.replace(config, target_field="summary"), "train")
