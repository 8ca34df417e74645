"""A model and its tokenizer from a directory, to use them."""

import os
from pathlib import Path
from typing import Any

from lin_jax.convert.directory import read_source
from lin_jax.convert.medusa import find_heads, read_heads
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.models.medusa import check_heads


def load(path: str | os.PathLike[str]) -> tuple[Any, Tokenizer]:
    """The model and the tokenizer of a run of lin_jax or of a Hugging Face directory.

    Medusa heads beside them (medusa_lm_head.safetensors or .pt) become `model.medusa`.

    Raises:
        ConfigError: there is no model, or its parts do not fit together.
    """
    directory = Path(path).expanduser().absolute()
    source = read_source(directory)
    model, heads = source.weights.model(), find_heads(directory)
    if heads is not None:
        model.medusa = read_heads(heads)
        check_heads(model.medusa, model)
    return model, source.tokenizer
