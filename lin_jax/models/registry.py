"""The model of a config."""

from typing import Any

from flax import nnx

from lin_jax.models.flash import Flash
from lin_jax.models.flash_settings import FlashConfig
from lin_jax.models.gpt2 import Gpt2
from lin_jax.models.gpt2_settings import Gpt2Config
from lin_jax.models.llama import Llama
from lin_jax.models.llama_settings import LlamaConfig
from lin_jax.models.settings import ModelConfig

MODELS: dict[type, Any] = {FlashConfig: Flash, LlamaConfig: Llama, Gpt2Config: Gpt2}


def create_model(config: ModelConfig, rngs: nnx.Rngs) -> Flash | Llama | Gpt2:
    """A model with fresh parameters.

    Every model has `features(tokens_BT, segment_ids_BT)`, `head(features)`, and called gives the logits of both.
    """
    return MODELS[type(config)](config, rngs=rngs)
