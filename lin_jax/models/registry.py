"""The models by architecture."""

from typing import Any

from flax import nnx

from lin_jax.models.base import Model, ModelConfig
from lin_jax.settings.registry import Registry

MODELS: Registry[type[Model]] = Registry(
    "architecture",
    "architecture",
    {
        "flash": "lin_jax.models.flash:Flash",
        "llama": "lin_jax.models.llama:Llama",
        "gpt2": "lin_jax.models.gpt2:Gpt2",
        "bert": "lin_jax.models.bert:Bert",
        "t5": "lin_jax.models.t5:T5",
    },
)


def create_model(config: ModelConfig, rngs: nnx.Rngs) -> Any:
    """Return a model with fresh parameters.

    Every decoder has `features(tokens_BT, segment_ids_BT)`, `head(features)`, and called gives the logits of both.
    """
    return MODELS[config.architecture](config, rngs=rngs)
