"""Medusa heads (Cai et al., 2024): each guesses a token further ahead from the features that the model's head reads."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.config import MedusaConfig, require
from lin_jax.layers.linear import Linear
from lin_jax.layers.stack import stack_layers

# How much less the loss of each further head weighs.
DECAY = 0.8


class MedusaHead(nnx.Module):
    """Residual blocks x + SiLU(W x + b), and a linear layer to logits without bias."""

    def __init__(self, config: MedusaConfig, width: int, vocabulary_size: int, *, rngs: nnx.Rngs):
        # Blocks start at 0, so that a new head computes what its linear layer does.
        block = lambda: Linear(width, width, ("width", None), deviation=0.0, rngs=rngs)  # noqa: E731
        self.blocks = nnx.List([block() for _ in range(config.layers)])
        self.logits = Linear(width, vocabulary_size, ("width", "vocabulary"), bias=False, deviation=0.0, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        """Logits, float32."""
        for block in self.blocks:
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
    width, vocabulary_size = model.config.width, model.config.vocabulary_size
    heads = MedusaHeads(config, width, vocabulary_size, rngs=rngs)
    kernel_CV = model.head(jnp.eye(width)) - model.head(jnp.zeros((1, width)))
    kernel = heads.heads.logits.kernel
    kernel.set_value(jnp.broadcast_to(kernel_CV, (config.heads, *kernel_CV.shape)))
    return heads


def check_heads(heads: MedusaHeads, model: Any) -> None:
    """Raise `ConfigError` for heads of another model."""
    ours, theirs = ((x.width, x.vocabulary_size) for x in (heads, model.config))
    require(
        ours == theirs,
        f"the Medusa heads are of another model: their width and vocabulary are {ours}, but the model's are {theirs}",
    )


def medusa_loss(
    logits_BTKV: Float[Array, "B T heads V"], tokens_BT: Int[Array, "B T"], weights_BT: Float[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, " heads"]]:
    """The sum over heads k = 1, 2, ... of 0.8^k times the mean cross-entropy of the tokens they guess.

    Args:
        logits_BTKV: of the heads at every token of a row.
        tokens_BT: the row. Head k at position t guesses token t + k + 1.
        weights_BT: which tokens count as targets; those of padding are 0.

    Returns:
        The loss, and the mean of each head.
    """
    K = logits_BTKV.shape[2]
    ahead = lambda x, k: jnp.pad(x[:, k + 1 :], ((0, 0), (0, min(k + 1, x.shape[1]))))  # noqa: E731
    targets_BTK = jnp.stack([ahead(tokens_BT, k) for k in range(1, K + 1)], axis=-1)
    weights_BTK = jnp.stack([ahead(weights_BT, k) for k in range(1, K + 1)], axis=-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_BTKV, targets_BTK) * weights_BTK
    mean_K = jnp.sum(losses, axis=(0, 1)) / jnp.maximum(jnp.sum(weights_BTK, axis=(0, 1)), 1)
    return jnp.sum(DECAY ** jnp.arange(1, K + 1) * mean_K), mean_K
