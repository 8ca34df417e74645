"""What can be wrong with the data, found before anything is compiled or written."""

from lin_jax.data.pipeline import token_pairs
from lin_jax.data.sources import open_source
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.settings.base import ConfigError, require
from lin_jax.settings.data import DataConfig


def check_vocabulary(config: DataConfig, model_vocabulary_size: int) -> None:
    """Check before a tokenizer is learned, which takes a while and leaves files, that the model can take it.

    Raises:
        ConfigError: the vocabulary that would be learned is larger than the model's.
    """
    if config.tokenizer == "train":
        check_fits(config.tokenizer_vocabulary, model_vocabulary_size, "data.tokenizer_vocabulary")


def check_data(config: DataConfig, model_vocabulary_size: int, tokenizer: Tokenizer) -> str:
    """Check that there is text for training and validation, and that the model knows all of its tokens.

    Returns:
        The fingerprint of the training text, see `lin_jax.data.sources.Source`.

    Raises:
        ConfigError: something is missing or wrong; the message says what, and how to mend it.
    """
    check_fits(tokenizer.vocabulary_size, model_vocabulary_size, f"the vocabulary of data.tokenizer={config.tokenizer}")
    validation = open_source(config, "validation")
    require(len(validation) > 0, "the validation split is empty; raise data.validation_fraction or give another split")
    token_pairs(validation, tokenizer, 0)
    train = open_source(config, "train")
    tokens = 0
    for index in range(len(train)):
        tokens += len(token_pairs(train, tokenizer, index))
        if tokens >= config.sequence_length:
            return train.fingerprint
    raise ConfigError(
        f"the training text has {tokens} tokens, fewer than one row of data.sequence_length={config.sequence_length}; "
        "give more text or shorter rows"
    )


def check_fits(size: int, model_vocabulary_size: int, what: str) -> None:
    """Raise `ConfigError` unless a model knows all `size` tokens of a vocabulary, `what` in the message."""
    require(
        size <= model_vocabulary_size,
        f"{what} is {size}, more than model.vocabulary_size={model_vocabulary_size}; "
        f"set --config.model.vocabulary_size={size} or more",
    )
