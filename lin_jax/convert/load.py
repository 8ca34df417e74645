"""A model and its tokenizer from a directory, to use them."""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

from lin_jax.convert.hub import local_path
from lin_jax.convert.hugging_face import Placement
from lin_jax.convert.source import Input, read_source
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.settings.base import require
from lin_jax.settings.mesh import MeshConfig
from lin_jax.train.sharding import make_mesh
from lin_jax.train.workdir import is_run, tokenizer_files


def load(path: str | os.PathLike[str], *, dtype: Literal["float32", "bfloat16"] | None = None) -> tuple[Any, Tokenizer]:
    """The model and the tokenizer of a run, a Hugging Face directory, or a name on the Hugging Face Hub.

    Of a run (`RUN`, or `RUN/checkpoints/STEP`) the newest checkpoint is taken, or that of the step.

    Adapters are merged. Medusa heads, of the run or beside the model (medusa_lm_head.safetensors or .pt), become
    `model.medusa`.

    Args:
        path: what is to be read.
        dtype: of parameters and activations; None keeps both as they are.

    Raises:
        ConfigError: there is no model, or its parts do not fit together.
    """
    require(dtype in (None, "float32", "bfloat16"), f"dtype must be float32 or bfloat16, but is {dtype}")
    source = read_source(Input(os.path.expanduser(path)), Placement(make_mesh(MeshConfig()), dtype))
    weights = source.weights
    if dtype is not None:
        weights = dataclasses.replace(weights, config=dataclasses.replace(weights.config, dtype=dtype))
    model = weights.model()
    model.medusa = source.heads
    return model, source.tokenizer


def tokenizer_files_of(path: str | os.PathLike[str]) -> Path:
    """The directory with the tokenizer of what `load` reads, in Hugging Face's form where it came in that.

    Raises:
        ConfigError: there is nothing at `path`.
    """
    directory = local_path(os.path.expanduser(path))
    return Path(tokenizer_files(str(directory))) if is_run(str(directory)) else directory
