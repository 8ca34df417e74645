"""Runs whose directory, text and base are on gs://, here a directory behind a file system of that name."""

import dataclasses
import gzip
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils
from safetensors.numpy import load_file

import convert_weights
from lin_jax.convert.hugging_face import ModelWeights, shapes_of, write_hugging_face
from lin_jax.data.files import text_files
from lin_jax.data.tokenizers import load_tokenizer
from lin_jax.experiment import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    FlashConfig,
    Gpt2Config,
    OptimizerConfig,
    SoftmaxConfig,
    TrainConfig,
)
from lin_jax.train import trainable
from lin_jax.train.loop import train
from lin_jax.train.metrics import METRICS, read_metrics
from lin_jax.train.saved_model import load_model

from .stub import Stub

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The directory that gs://bucket is; checkpoints are written as they are to Google's storage."""
    root = tmp_path / "remote"
    (root / "bucket").mkdir(parents=True)

    class Storage(DirFileSystem):
        protocol, cachable = "gcs", False

        def __init__(self, **options):
            super().__init__(path=str(root), fs=LocalFileSystem(auto_mkdir=True))

        @classmethod
        def _strip_protocol(cls, path):
            return path.removeprefix("gs://")

    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: Storage())
    place = lambda path: {"driver": "file", "path": str(root / path.removeprefix("gs://"))}  # noqa: E731
    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", place)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    return root / "bucket"


@pytest.fixture
def config(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(
        trainable, "create_model", lambda config, rngs: Stub(rngs, config.vocabulary_size, config.width)
    )
    lines = [json.dumps({"text": "abc " * (index % 9 + 1) + str(index)}) + "\n" for index in range(100)]
    (bucket / "text").mkdir()
    (bucket / "text" / "one.jsonl").write_text("".join(lines[:50]))
    (bucket / "text" / "two.jsonl.gz").write_bytes(gzip.compress("".join(lines[50:]).encode()))
    cache = str(tmp_path / "cache")
    return Config(
        workdir="gs://bucket/run",
        model=FlashConfig(vocabulary_size=257, width=16),
        data=DataConfig(
            source="text", path=("gs://bucket/text/*",), cache_directory=cache, sequence_length=16, batch_size=8
        ),
        optimizer=OptimizerConfig(schedule="constant"),
        train=TrainConfig(steps=4, evaluate_every=2, evaluate_batches=1, log_every=2),
        checkpoint=CheckpointConfig(every=2),
    )


def test_a_remote_run_is_a_local_one(config, bucket, tmp_path):
    local = dataclasses.replace(config, workdir=str(tmp_path / "local"))
    longer = dataclasses.replace(config.train, steps=6)
    train(config)
    messages = []
    train(dataclasses.replace(config, train=longer), messages.append)
    assert "resumed from the checkpoint of step 4" in messages[0]
    train(dataclasses.replace(local, train=longer))
    for name in ("run.json", "learning_curve.png", "tokenizer/tokenizer_info.json", "checkpoints/6"):
        assert (bucket / "run" / name).exists(), name
    assert len(list((bucket / "run" / "tensorboard").iterdir())) == 2
    remote, whole = (read_metrics(place / METRICS) for place in (bucket / "run", tmp_path / "local"))
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (remote, whole)]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    model, _, loaded = load_model("gs://bucket/run")
    assert loaded.workdir == "gs://bucket/run"
    theirs, _, _ = load_model(str(tmp_path / "local"))
    np.testing.assert_array_equal(model.embedding.get_value(), theirs.embedding.get_value())
    assert not list(tmp_path.glob("gs*")), "it was written to a local directory of that name"


def test_remote_files_are_copied_once(bucket, tmp_path):
    (bucket / "a.txt").write_text("text")
    for _ in range(2):
        (file,) = text_files(("gs://bucket/a.txt",), "data.path", str(tmp_path / "cache"))
        assert file.name == "gs://bucket/a.txt" and Path(file.path).read_text() == "text"
    with pytest.raises(ConfigError, match=r"data\.path: gs://bucket/b\*\.txt matches no file"):
        text_files(("gs://bucket/b*.txt",), "data.path", str(tmp_path / "cache"))


def write_tokenizer(directory):
    directory.mkdir()
    model = tokenizers.models.BPE({"a": 0, "</s>": 1}, [])
    tokenizers.Tokenizer(model).save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def test_conversions_there_and_back(bucket, tmp_path, capsys):
    write_tokenizer(bucket / "theirs")
    attention = SoftmaxConfig()
    sizes = {"width": 8, "depth": 1, "heads": 2, "feed_forward_size": 8, "positions": 16}
    model = Gpt2Config(vocabulary_size=2, attention=attention, **sizes)
    random = np.random.default_rng(0)
    arrays = {path: jnp.asarray(random.normal(size=s.shape), s.dtype) for path, s in shapes_of(model).items()}
    write_hugging_face(bucket / "theirs", ModelWeights(model, arrays), None, {})
    for source, target, form in (("theirs", "ours", "lin_jax"), ("ours", "back", "hf")):
        names = f"gs://bucket/{source}", f"gs://bucket/{target}"
        assert convert_weights.main(["--input", names[0], "--output", names[1], "--to", form]) == 0
        assert capsys.readouterr().out.startswith(f"{names[1]}: gpt2")
    before, after = (load_file(bucket / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    assert convert_weights.main(["--input", "gs://bucket/none", "--output", str(tmp_path / "out")]) == 2
    assert "gs://bucket/none does not exist" in capsys.readouterr().err


def test_a_remote_tokenizer(bucket):
    write_tokenizer(bucket / "own")
    found = load_tokenizer(DataConfig(tokenizer="gs://bucket/own"), "unused")
    assert found.encode("aa").tolist() == [0, 0] and found.end_id == 1
    with pytest.raises(ConfigError, match=r"data\.tokenizer: gs://bucket/none is no directory"):
        load_tokenizer(DataConfig(tokenizer="gs://bucket/none"), "unused")


def test_other_schemes_are_refused():
    with pytest.raises(ConfigError, match="config.workdir: ftp://a/b is neither local nor does it begin with gs://"):
        train(Config(workdir="ftp://a/b"))
