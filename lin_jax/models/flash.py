"""FLASH: a language model of gated attention units (Hua et al., 2022, as released with You et al., 2024)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.layers.embedding import look_up
from lin_jax.layers.linear import Linear
from lin_jax.layers.norms import LayerNorm
from lin_jax.layers.parameter import parameter
from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.layers.positions import sinusoids
from lin_jax.layers.stack import run_layers, stack_layers
from lin_jax.models.flash_settings import FlashConfig
from lin_jax.models.gated_attention import GatedAttention, place
from lin_jax.models.language_model import LanguageModel
from lin_jax.settings.base import require


class Flash(LanguageModel):
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
        self,
        tokens_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"] | None = None,
        partition: Partition = WHOLE,
    ) -> Float[Array, "B T C"]:
        """What the head reads, in the compute type.

        Args:
            tokens_BT: token ids.
            segment_ids_BT: every run of equal ids is a sequence of its own, 0 is padding; None: a row is a sequence.
            partition: how rows, heads and vocabulary are cut over devices.
        """
        B, T = tokens_BT.shape
        rows = place(segment_ids_BT, (B, T), self.config.padding, partition)
        x_BTC, _ = self.embed(tokens_BT, rows.position_BT, partition)
        return self.norm(run_layers(self.layers, x_BTC, rows, remat=self.config.remat, partition=partition))

    def embed(
        self, tokens_BT: Int[Array, "B T"], position_BT: Int[Array, "B T"], partition: Partition = WHOLE
    ) -> tuple[Array, tuple[Any, ...]]:
        """Input of the first layer, and what all layers are told of positions."""
        position_BTC = self.position_scale[...] * sinusoids(position_BT, self.config.width)
        x_BTC = look_up(self.embedding[...], tokens_BT, partition) + position_BTC
        return x_BTC.astype(self.config.dtype), (position_BT,)

    def check_decodable(self, capacity: int) -> None:
        """Raise `ConfigError` unless sequences can be decoded exactly, however long."""
        config, attention = self.config, self.config.attention
        require(attention.causal, "attention.causal=false predicts no next token, so that nothing can be generated")
        require(
            attention.kind == "augmented",
            f"attention.kind={attention.kind} of FLASH reads whole rows and cannot be decoded; train kind=augmented",
        )
        require(config.padding == "exact", "padding=released mixes padding into a row and cannot be decoded: use exact")

    def head(self, x_BTC: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        """Logits of `features`, float32."""
        return self.logits(x_BTC).astype(jnp.float32)

    def __call__(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the next token after each, see `features`."""
        return self.head(self.features(tokens_BT, segment_ids_BT))
