"""A model and its tokenizer from a directory, to use them."""

import os
from typing import Any

from lin_jax.config import MeshConfig
from lin_jax.convert.hub import local_path
from lin_jax.convert.hugging_face import Target
from lin_jax.convert.medusa import find_heads, read_heads
from lin_jax.convert.source import Input, read_source
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.models.medusa import check_heads
from lin_jax.train.sharding import make_mesh


def load(path: str | os.PathLike[str]) -> tuple[Any, Tokenizer]:
    """The model and the tokenizer of a run of lin_jax, a Hugging Face directory, or a name on the Hugging Face Hub.

    Adapters are merged. Medusa heads beside them (medusa_lm_head.safetensors or .pt) become `model.medusa`.

    Raises:
        ConfigError: there is no model, or its parts do not fit together.
    """
    directory = local_path(os.path.expanduser(path))
    source = read_source(Input(str(directory)), Target(make_mesh(MeshConfig())))
    model, heads = source.weights.model(), find_heads(directory)
    if heads is not None:
        model.medusa = read_heads(heads)
        check_heads(model.medusa, model)
    return model, source.tokenizer
