"""The model of a config."""

from typing import Any

from flax import nnx

from lin_jax.config import FlashConfig, Gpt2Config, LlamaConfig, ModelConfig
from lin_jax.models.flash import Flash
from lin_jax.models.gpt2 import Gpt2
from lin_jax.models.llama import Llama

MODELS: dict[type, Any] = {FlashConfig: Flash, LlamaConfig: Llama, Gpt2Config: Gpt2}


def create_model(config: ModelConfig, rngs: nnx.Rngs) -> Flash | Llama | Gpt2:
    """A model with fresh parameters.

    Every model has `features(tokens_BT, segment_ids_BT)`, `head(features)`, and called gives the logits of both.
    """
    return MODELS[type(config)](config, rngs=rngs)
