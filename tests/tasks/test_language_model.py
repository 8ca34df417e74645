"""The measures of a text, and what the task refuses."""

import math

import numpy as np
import pytest

from lin_jax.data.tokenizers import BytesTokenizer
from lin_jax.experiment import Config, ConfigError, DataConfig, FinetuneConfig, LoraConfig
from lin_jax.tasks.language_model import LanguageModelling, text_values
from lin_jax.tasks.loss import LossSums


def test_measures_of_a_text_whose_tokens_are_guessed_evenly():
    """Each of 100 tokens among 8: 3 bits each, of which each stands for 4 bytes."""
    found = text_values(100 * math.log(8), 100.0, 400.0)
    expected = {"validation_loss": math.log(8), "perplexity": 8, "bits_per_byte": 0.75}
    assert found == {name: pytest.approx(value, rel=1e-12) for name, value in expected.items()}


def test_without_tokens_there_is_no_measure():
    assert all(math.isnan(text_values(0.0, 0.0, 0.0)[name]) for name in ("validation_loss", "bits_per_byte"))


def test_a_loss_beyond_floats_has_a_finite_perplexity():
    assert math.isfinite(text_values(1e6, 1.0, 1.0)["perplexity"])


def test_bytes_per_token_are_those_of_the_validation_text(tmp_path):
    """Bytes as tokens: a document of 11 bytes is 12 tokens, with its end."""
    file = tmp_path / "text.txt"
    file.write_text("hello world")
    data = DataConfig(source="text", validation_path=(str(file),), cache_directory=str(tmp_path))
    task = LanguageModelling(Config(data=data))
    sums = LossSums(np.float64(0), np.float64(24 * math.log(2)), np.float64(24))
    assert task.values(sums, BytesTokenizer())["bits_per_byte"] == pytest.approx(12 / 11)


def test_the_lowest_loss_is_the_best():
    task = LanguageModelling(Config())
    assert task.cost({"validation_loss": 1.0, "perplexity": 9.0}) < task.cost(
        {"validation_loss": 2.0, "perplexity": 1.0}
    )


def test_something_must_train():
    with pytest.raises(ConfigError, match="finetune.train is empty and there are no adapters: nothing to train"):
        Config(finetune=FinetuneConfig(checkpoint="x", train=()))
    Config(finetune=FinetuneConfig(checkpoint="x", train=(), lora=LoraConfig(rank=1)))
