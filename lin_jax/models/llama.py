"""LLaMA 1, 2 and 3 (Touvron et al., 2023), with softmax or linearized attention."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attentions.mixing import Mixing, MixingState, layer_kinds
from lin_jax.layers.embedding import look_up
from lin_jax.layers.linear import Linear
from lin_jax.layers.norms import RMSNorm
from lin_jax.layers.parameter import parameter
from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.layers.rope import Rotation, rotate_halves, rotation
from lin_jax.layers.stack import run_layers, stack_layers
from lin_jax.layers.steps import Step
from lin_jax.models.gated_attention import Rows, place
from lin_jax.models.language_model import LanguageModel, check_transformer
from lin_jax.models.llama_settings import LlamaConfig
from lin_jax.ops.linear_attention.state import Pending
from lin_jax.settings.base import require

# Standard deviation of initial matrices.
DEVIATION = 0.02


class LlamaAttention(nnx.Module):
    """Projections, rotary positions, and attention of any kind."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        C, D = config.width, config.head_size
        self.config = config
        into = lambda heads: Linear(  # noqa: E731
            C, heads * D, ("width", "heads"), bias=config.attention_bias, deviation=DEVIATION, rngs=rngs
        )
        self.query = into(config.heads)
        self.key = into(config.key_value_heads)
        self.value = into(config.key_value_heads)
        self.output = Linear(
            config.heads * D, C, ("heads", "width"), bias=config.attention_bias, deviation=DEVIATION, rngs=rngs
        )
        self.mixing = Mixing(config.attention, config.heads)

    def __call__(
        self, x_BTC: Float[Array, "B T C"], rows: Rows, rotation: Rotation, kind: str
    ) -> Float[Array, "B T C"]:
        """Applies the attention."""
        return self._output(self.mixing(*self._project(x_BTC, rotation), rows, kind))

    def decode(
        self, x_BTC: Float[Array, "B T C"], rotation: Rotation, state: MixingState, step: Step
    ) -> tuple[Array, MixingState | Pending]:
        """The attention of tokens that follow a state, see `Mixing.decode`."""
        y_BTHD, after = self.mixing.decode(*self._project(x_BTC, rotation), state, step)
        return self._output(y_BTHD), after

    def _project(self, x_BTC: Array, rotation: Rotation) -> tuple[Array, Array, Array]:
        """Queries, keys and values."""
        heads = lambda x: x.reshape(*x.shape[:2], -1, self.config.head_size)  # noqa: E731
        q_BTHD = rotate_halves(heads(self.query(x_BTC)), rotation)
        k_BTKD = rotate_halves(heads(self.key(x_BTC)), rotation)
        return q_BTHD, k_BTKD, heads(self.value(x_BTC))

    def _output(self, y_BTHD: Array) -> Array:
        return self.output(y_BTHD.reshape(*y_BTHD.shape[:2], -1))


class SwiGlu(nnx.Module):
    """W_down (SiLU(W_gate x) * W_up x) (Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        C, F, bias = config.width, config.feed_forward_size, config.feed_forward_bias
        self.gate = Linear(C, F, ("width", "feed_forward"), bias=bias, deviation=DEVIATION, rngs=rngs)
        self.up = Linear(C, F, ("width", "feed_forward"), bias=bias, deviation=DEVIATION, rngs=rngs)
        self.down = Linear(F, C, ("feed_forward", "width"), bias=bias, deviation=DEVIATION, rngs=rngs)

    def __call__(self, x_BTC: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """Applies the layer."""
        return self.down(jax.nn.silu(self.gate(x_BTC)) * self.up(x_BTC))


class LlamaLayer(nnx.Module):
    """Attention and feed-forward layer, each behind a norm and around a residual."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = LlamaAttention(config, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_epsilon)
        self.feed_forward = SwiGlu(config, rngs=rngs)

    def __call__(
        self, x_BTC: Float[Array, "B T C"], rows: Rows, rotation: Rotation, kind: str
    ) -> Float[Array, "B T C"]:
        """Applies the layer."""
        return self.feed(x_BTC + self.attend(x_BTC, rows, rotation, kind))

    def attend(self, x_BTC: Float[Array, "B T C"], rows: Rows, rotation: Rotation, kind: str) -> Float[Array, "B T C"]:
        """What the attention adds."""
        return self.attention(self.attention_norm(x_BTC), rows, rotation, kind)

    def feed(self, x_BTC: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """x with what the feed-forward layer adds."""
        return x_BTC + self.feed_forward(self.feed_forward_norm(x_BTC))

    def empty_state(self, batch: int, capacity: int, kind: str) -> MixingState:
        """The state before the first token, see `Mixing.empty_state`."""
        config = self.attention.config
        none_BTKD = jnp.zeros((batch, 0, config.key_value_heads, config.head_size), config.dtype)
        return self.attention.mixing.empty_state(none_BTKD, none_BTKD, capacity, kind)

    def decode(
        self, x_BTC: Float[Array, "B T C"], rotation: Rotation, state: MixingState, step: Step
    ) -> tuple[Array, MixingState | Pending]:
        """The layer for tokens that follow a state, see `Mixing.decode`."""
        attended_BTC, after = self.attention.decode(self.attention_norm(x_BTC), rotation, state, step)
        return self.feed(x_BTC + attended_BTC), after

    def commit(
        self, state: MixingState, pending: Pending, path_BP: Int[Array, "B P"], count_B: Int[Array, " B"]
    ) -> MixingState:
        """The state after the first `count_B` nodes of each row's path."""
        return self.attention.mixing.commit(state, pending, path_BP, count_B)


class Llama(LanguageModel):
    """Token embedding, layers, norm, and a head that may share the embedding's matrix."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        V, C = config.vocabulary_size, config.width
        self.config = config
        embedding = DEVIATION * jax.random.normal(rngs.params(), (V, C))
        self.embedding = parameter(embedding, ("vocabulary", "width"), decay=True)
        self.layers = stack_layers(lambda rngs: LlamaLayer(config, rngs=rngs), config.depth, rngs)
        self.norm = RMSNorm(C, config.norm_epsilon)
        if not config.tie_embeddings:
            self.logits = Linear(C, V, ("width", "vocabulary"), bias=False, deviation=DEVIATION, rngs=rngs)

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
        config = self.config
        x_BTC, *shared = self.begin(tokens_BT, segment_ids_BT, partition)
        kinds = layer_kinds(config.attention, config.depth)
        return self.norm(run_layers(self.layers, x_BTC, *shared, remat=config.remat, kinds=kinds, partition=partition))

    def begin(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None, partition: Partition = WHOLE
    ) -> tuple[Any, ...]:
        """What the first layer reads of whole rows, and what all layers are told."""
        config, (B, T) = self.config, tokens_BT.shape
        rows = place(segment_ids_BT, (B, T), "exact", partition)
        turn = rotation(config.rope, rows.position_BT, config.head_size, config.positions)
        return look_up(self.embedding[...], tokens_BT, partition).astype(config.dtype), rows, turn

    def embed(self, tokens_BT: Int[Array, "B T"], position_BT: Int[Array, "B T"]) -> tuple[Array, tuple[Any, ...]]:
        """Input of the first layer, and what all layers are told of the positions of tokens that follow a state."""
        config = self.config
        # Within `positions` dynamic scaling changes nothing, and beyond them it is refused.
        rope = config.rope if config.rope.scaling != "dynamic" else dataclasses.replace(config.rope, scaling="default")
        turn = rotation(rope, position_BT, config.head_size, config.positions)
        return self.embedding[...][tokens_BT].astype(config.dtype), (turn,)

    def check_decodable(self, capacity: int) -> None:
        """Raise `ConfigError` unless sequences of `capacity` tokens can be decoded exactly."""
        config = self.config
        check_transformer(config, capacity)
        require(
            config.rope.scaling != "dynamic" or capacity <= config.positions,
            f"rope.scaling=dynamic changes what was computed once a sequence exceeds positions={config.positions}, but "
            f"{capacity} tokens are asked for: use fewer, or rope.scaling=linear or llama3",
        )

    def head(self, x_BTC: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        """Logits of `features`, float32."""
        if self.config.tie_embeddings:
            return (x_BTC @ self.embedding[...].astype(x_BTC.dtype).T).astype("float32")
        return self.logits(x_BTC).astype("float32")

    def __call__(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the next token after each, see `features`."""
        return self.head(self.features(tokens_BT, segment_ids_BT))
