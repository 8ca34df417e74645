"""A model and its tokenizer from a directory, to use them."""

import os
from typing import Any

from lin_jax.config import MeshConfig
from lin_jax.convert.hugging_face import Target
from lin_jax.convert.source import Input, read_source
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.train.sharding import make_mesh


def load(path: str | os.PathLike[str]) -> tuple[Any, Tokenizer]:
    """The model and the tokenizer of a run of lin_jax, a Hugging Face directory, or a name on the Hugging Face Hub.

    Adapters are merged. Medusa heads, of the run or beside the model (medusa_lm_head.safetensors or .pt), become
    `model.medusa`.

    Raises:
        ConfigError: there is no model, or its parts do not fit together.
    """
    source = read_source(Input(os.path.expanduser(path)), Target(make_mesh(MeshConfig())))
    model = source.weights.model()
    model.medusa = source.heads
    return model, source.tokenizer
