"""FLASH: a language model of gated attention units (Hua et al., 2022, as released with You et al., 2024)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.config import FlashConfig
from lin_jax.layers.gated_attention import GatedAttention, place
from lin_jax.layers.linear import Linear
from lin_jax.layers.norms import LayerNorm
from lin_jax.layers.parameter import parameter
from lin_jax.layers.positions import sinusoids
from lin_jax.layers.stack import run_layers, stack_layers


class Flash(nnx.Module):
    """Token embedding with scaled sinusoids, gated attention units, layer norm, untied head with bias."""

    def __init__(self, config: FlashConfig, *, rngs: nnx.Rngs):
        V, C = config.vocabulary_size, config.width
        self.config = config
        self.embedding = parameter(jax.random.normal(rngs.params(), (V, C)), ("vocabulary", "width"), decay=True)
        self.position_scale = parameter(jnp.ones(()), ())
        self.layers = stack_layers(lambda rngs: GatedAttention(config, rngs=rngs), config.depth, rngs)
        self.norm = LayerNorm(C)
        self.logits = Linear(C, V, ("width", "vocabulary"), rngs=rngs)

    def features(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T C"]:
        """What the head reads, in the compute type.

        Args:
            tokens_BT: token ids.
            segment_ids_BT: every run of equal ids is a sequence of its own, 0 is padding; None: a row is a sequence.
        """
        B, T = tokens_BT.shape
        rows = place(segment_ids_BT, (B, T), self.config.padding)
        position_BTC = self.position_scale[...] * sinusoids(rows.position_BT, self.config.width)
        x_BTC = (self.embedding[...][tokens_BT] + position_BTC).astype(self.config.dtype)
        return self.norm(run_layers(self.layers, x_BTC, rows, remat=self.config.remat))

    def head(self, x_BTC: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        """Logits of `features`, float32."""
        return self.logits(x_BTC).astype(jnp.float32)

    def __call__(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the next token after each, see `features`."""
        return self.head(self.features(tokens_BT, segment_ids_BT))
