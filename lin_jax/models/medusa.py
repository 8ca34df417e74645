"""Medusa heads (Cai et al., 2024): each guesses a token further ahead from the features that the model's head reads."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lin_jax.layers.linear import Linear
from lin_jax.layers.stack import stack_layers
from lin_jax.models.base import ModelConfig
from lin_jax.settings.base import require
from lin_jax.settings.medusa import MedusaConfig

# The heads' name in a model, and so the first part of their parameters' paths.
HEADS = "medusa"


class MedusaHead(nnx.Module):
    """Residual blocks x + SiLU(W x + b), and a linear layer to logits without bias."""

    def __init__(self, config: MedusaConfig, width: int, vocabulary_size: int, *, rngs: nnx.Rngs):
        # Blocks start at 0, so that a new head computes what its linear layer does.
        options: dict[str, Any] = {"deviation": 0.0, "rngs": rngs}
        blocks = {str(number): Linear(width, width, ("width", None), **options) for number in range(config.layers)}
        self.blocks = nnx.Dict(blocks)
        self.logits = Linear(width, vocabulary_size, ("width", "vocabulary"), bias=False, **options)

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        """Logits, float32."""
        for block in self.blocks.values():
            x = x + jax.nn.silu(block(x))
        return self.logits(x).astype(jnp.float32)


class MedusaHeads(nnx.Module):
    """Heads that guess the tokens 2, 3, ... places after the one whose features they read."""

    def __init__(self, config: MedusaConfig, width: int, vocabulary_size: int, *, rngs: nnx.Rngs):
        self.config = config
        self.width = width
        self.vocabulary_size = vocabulary_size
        self.heads = stack_layers(
            lambda rngs: MedusaHead(config, width, vocabulary_size, rngs=rngs), config.heads, rngs
        )

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch heads V"]:
        """Logits of all heads, float32."""
        graph, arrays = nnx.split(self.heads)
        logits = jax.vmap(lambda arrays: nnx.merge(graph, arrays)(x))(arrays)
        return jnp.moveaxis(logits, 0, -2)


def start_heads(config: MedusaConfig, model: Any, rngs: nnx.Rngs) -> MedusaHeads:
    """New heads for a model, each computing what the model's own head does (without its bias)."""
    heads = MedusaHeads(config, model.config.width, model.config.vocabulary_size, rngs=rngs)
    kernel = heads.heads.logits.kernel
    kernel.set_value(jnp.broadcast_to(first_kernel(model), kernel.get_value().shape))
    return heads


def first_kernel(model: Any) -> Float[Array, "C V"]:
    """The last layer of a new head: the matrix of the model's own head."""
    width = model.config.width
    return model.head(jnp.eye(width)) - model.head(jnp.zeros((1, width)))


def check_heads(heads: MedusaHeads, config: ModelConfig) -> None:
    """Raise `ConfigError` for heads of another model than one of these settings."""
    ours, theirs = ((x.width, x.vocabulary_size) for x in (heads, config))
    require(
        ours == theirs,
        f"the Medusa heads are of another model: their width and vocabulary are {ours}, but the model's are {theirs}",
    )
