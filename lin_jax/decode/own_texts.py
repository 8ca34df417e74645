"""Texts of a model's own, for its heads to learn from (self-distillation)."""

import json
from collections.abc import Iterator, Sequence
from typing import TextIO

from lin_jax.data.tokenizers import Tokenizer
from lin_jax.decode.text import TextGenerator
from lin_jax.models.base import Decoder
from lin_jax.settings.generate import GenerateConfig


def write_own_texts(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], config: GenerateConfig, file: TextIO
) -> Iterator[int]:
    """Continue prompts, and write each with its continuation as a line {"text": ...}, which `data.path` reads.

    Yields the number of texts written so far, after each batch.

    Raises:
        ConfigError: a setting or a prompt is wrong.
    """
    written = 0
    for batch in TextGenerator(model, tokenizer, config).batches(prompts):
        *_, last = batch
        for row in last:
            file.write(json.dumps({"text": row.prompt + row.text}) + "\n")
        written += len(last)
        yield written
