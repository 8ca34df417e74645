"""What the programs refuse before anything is compiled."""

import pytest

from lin_jax.data.checks import check_data, check_vocabulary
from lin_jax.data.tokenizers import BytesTokenizer
from lin_jax.experiment import ConfigError


def test_good_data_passes(text_config):
    check_data(text_config(["x" * 15, "y"], sequence_length=16), 257, BytesTokenizer())


def test_a_model_with_too_small_a_vocabulary_is_refused(text_config):
    config = text_config(["x" * 99], sequence_length=16, tokenizer_vocabulary=4096)
    with pytest.raises(
        ConfigError, match=r"tokenizer=bytes is 257, more than model\.vocabulary_size=256; set --config"
    ):
        check_data(config, 256, BytesTokenizer())
    check_vocabulary(config, 256)


def test_a_vocabulary_to_be_learned_is_checked_before(text_config):
    config = text_config(["x"], tokenizer="train", tokenizer_vocabulary=4096)
    check_vocabulary(config, 4096)
    with pytest.raises(ConfigError, match=r"data\.tokenizer_vocabulary is 4096, more than model\.vocabulary_size=4095"):
        check_vocabulary(config, 4095)


def test_a_text_shorter_than_a_row_is_refused(text_config):
    config = text_config(["x" * 7, "y" * 6], sequence_length=16)
    with pytest.raises(ConfigError, match=r"has 15 tokens, fewer than one row of data\.sequence_length=16"):
        check_data(config, 257, BytesTokenizer())
