"""The model of a config."""

from flax import nnx

from lin_jax.config import FlashConfig
from lin_jax.models.flash import Flash

MODELS = {FlashConfig: Flash}


def create_model(config: FlashConfig, rngs: nnx.Rngs) -> Flash:
    """A model with fresh parameters.

    Every model has `features(tokens_BT, segment_ids_BT)`, `head(features)`, and called gives the logits of both.
    """
    return MODELS[type(config)](config, rngs=rngs)
