"""The settings of a run of a very small model, and such a run that nothing happened to."""

import dataclasses
import json

import numpy as np
import pytest

from lin_jax.experiment import CheckpointConfig, Config, DataConfig, FlashConfig, OptimizerConfig, TrainConfig
from lin_jax.train import trainable
from lin_jax.train.loop import train

from .small_run import STEPS
from .stub import Stub


@pytest.fixture(scope="module")
def stub_model():
    def create(config, rngs):
        return Stub(rngs, config.vocabulary_size, config.width)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainable, "create_model", create)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), size)) for size in random.integers(1, 8, 50)]
    file = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    texts = (" ".join(random.choice(words, size)) for size in random.integers(5, 120, 200))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, corpus, stub_model):
    """A run that nothing happens to; `config` has the same settings."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    whole = Config(
        workdir=str(directory / "run"),
        model=FlashConfig(vocabulary_size=257, width=16),
        data=DataConfig(
            source="text",
            path=(corpus,),
            cache_directory=str(directory / "cache"),
            sequence_length=16,
            batch_size=8,
            packing="segments",
        ),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=5),
        train=TrainConfig(steps=STEPS, evaluate_every=8, evaluate_batches=3, log_every=3),
        checkpoint=CheckpointConfig(every=5),
    )
    result = train(whole)
    assert not result.interrupted and result.step == STEPS
    return whole


@pytest.fixture
def config(uninterrupted, tmp_path):
    return dataclasses.replace(uninterrupted, workdir=str(tmp_path / "run"))
