"""GPT-2 (Radford et al., 2019), with softmax or linearized attention, as a language model or a classifier."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attentions.mixing import Mixing, MixingState, layer_kinds
from lin_jax.layers.embedding import look_up
from lin_jax.layers.linear import Linear
from lin_jax.layers.norms import LayerNorm
from lin_jax.layers.parameter import parameter
from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.layers.stack import run_layers, stack_layers
from lin_jax.layers.steps import Step
from lin_jax.models.gated_attention import Rows, place
from lin_jax.models.gpt2_settings import Gpt2Config
from lin_jax.models.language_model import LanguageModel, check_transformer
from lin_jax.ops.linear_attention.state import Pending
from lin_jax.settings.base import require

# Standard deviation of initial matrices; the two that write to the residual have it divided by sqrt(2 L).
DEVIATION = 0.02


class Gpt2Layer(nnx.Module):
    """Attention and feed-forward layer, each behind a norm and around a residual."""

    def __init__(self, config: Gpt2Config, *, rngs: nnx.Rngs):
        C, F = config.width, config.feed_forward_size
        residual = DEVIATION / (2 * config.depth) ** 0.5
        self.config = config
        self.attention_norm = LayerNorm(C, config.norm_epsilon)
        self.query_key_value = Linear(C, 3 * C, ("width", "heads"), deviation=DEVIATION, rngs=rngs)
        self.mixing = Mixing(config.attention, config.heads)
        self.output = Linear(C, C, ("heads", "width"), deviation=residual, rngs=rngs)
        self.feed_forward_norm = LayerNorm(C, config.norm_epsilon)
        self.up = Linear(C, F, ("width", "feed_forward"), deviation=DEVIATION, rngs=rngs)
        self.down = Linear(F, C, ("feed_forward", "width"), deviation=residual, rngs=rngs)

    def __call__(self, x_BTC: Float[Array, "B T C"], rows: Rows, kind: str) -> Float[Array, "B T C"]:
        """Applies the layer."""
        return self.feed(x_BTC + self.attend(x_BTC, rows, kind))

    def attend(self, x_BTC: Float[Array, "B T C"], rows: Rows, kind: str) -> Float[Array, "B T C"]:
        """What the attention adds."""
        y_BTHD = self.mixing(*self._project(x_BTC, rows.partition), rows, kind)
        return self.output(y_BTHD.reshape(x_BTC.shape))

    def _project(self, x_BTC: Array, partition: Partition = WHOLE) -> tuple[Array, Array, Array]:
        """Queries, keys and values."""
        joint = self.query_key_value.parts(self.attention_norm(x_BTC), 3, partition)
        q, k, v = (x.reshape(*x.shape[:2], self.config.heads, -1) for x in joint)
        return q, k, v

    def feed(self, x_BTC: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """x with what the feed-forward layer adds."""
        # gelu_new is the approximation by tanh.
        wide_BTF = jax.nn.gelu(self.up(self.feed_forward_norm(x_BTC)), approximate=True)
        return x_BTC + self.down(wide_BTF)

    def empty_state(self, batch: int, capacity: int, kind: str) -> MixingState:
        """The state before the first token, see `Mixing.empty_state`."""
        none_BTHD = jnp.zeros((batch, 0, self.config.heads, self.config.head_size), self.config.dtype)
        return self.mixing.empty_state(none_BTHD, none_BTHD, capacity, kind)

    def decode(
        self, x_BTC: Float[Array, "B T C"], state: MixingState, step: Step
    ) -> tuple[Array, MixingState | Pending]:
        """The layer for tokens that follow a state, see `Mixing.decode`."""
        y_BTHD, after = self.mixing.decode(*self._project(x_BTC), state, step)
        return self.feed(x_BTC + self.output(y_BTHD.reshape(x_BTC.shape))), after

    def commit(
        self, state: MixingState, pending: Pending, path_BP: Int[Array, "B P"], count_B: Int[Array, " B"]
    ) -> MixingState:
        """The state after the first `count_B` nodes of each row's path."""
        return self.mixing.commit(state, pending, path_BP, count_B)


class Gpt2(LanguageModel):
    """Token and position embeddings, layers, norm, and a head that nearly always shares the tokens' matrix."""

    def __init__(self, config: Gpt2Config, *, rngs: nnx.Rngs):
        V, C = config.vocabulary_size, config.width
        self.config = config
        embedding = DEVIATION * jax.random.normal(rngs.params(), (V, C))
        positions = DEVIATION * jax.random.normal(rngs.params(), (config.positions, C))
        self.embedding = parameter(embedding, ("vocabulary", "width"), decay=True)
        self.position_embedding = parameter(positions, ("positions", "width"), decay=True)
        self.layers = stack_layers(lambda rngs: Gpt2Layer(config, rngs=rngs), config.depth, rngs)
        self.norm = LayerNorm(C, config.norm_epsilon)
        if not config.tie_embeddings:
            self.logits = Linear(C, V, ("width", "vocabulary"), bias=False, deviation=DEVIATION, rngs=rngs)
        if config.labels:
            self.score = Linear(C, config.labels, ("width", None), bias=False, deviation=DEVIATION, rngs=rngs)

    def features(
        self,
        tokens_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"] | None = None,
        partition: Partition = WHOLE,
    ) -> Float[Array, "B T C"]:
        """What the head reads, in the compute type.

        Args:
            tokens_BT: token ids.
            segment_ids_BT: every run of equal ids is a sequence of its own, with positions from 0; 0 is padding; None:
                a row is a sequence.
            partition: how rows, heads and vocabulary are cut over devices.

        Raises:
            ConfigError: T exceeds the positions that the model knows.
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
        require(config.positions >= T, f"rows of {T} tokens are longer than the model's positions={config.positions}")
        rows = place(segment_ids_BT, (B, T), "exact", partition)
        x_BTC, shared = self.embed(tokens_BT, rows.position_BT, partition)
        return x_BTC, rows, *shared

    def embed(
        self, tokens_BT: Int[Array, "B T"], position_BT: Int[Array, "B T"], partition: Partition = WHOLE
    ) -> tuple[Array, tuple[Any, ...]]:
        """Input of the first layer, and what all layers are told of positions: nothing."""
        x_BTC = look_up(self.embedding[...], tokens_BT, partition) + self.position_embedding[...][position_BT]
        return x_BTC.astype(self.config.dtype), ()

    def check_decodable(self, capacity: int) -> None:
        """Raise `ConfigError` unless sequences of `capacity` tokens can be decoded exactly."""
        positions = self.config.positions
        check_transformer(self.config, capacity)
        require(capacity <= positions, f"{capacity} tokens exceed the model's positions={positions}: ask for fewer")

    def head(self, x_BTC: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        """Logits of `features`, float32."""
        if self.config.tie_embeddings:
            return (x_BTC @ self.embedding[...].astype(x_BTC.dtype).T).astype(jnp.float32)
        return self.logits(x_BTC).astype(jnp.float32)

    def __call__(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the next token after each, see `features`."""
        return self.head(self.features(tokens_BT, segment_ids_BT))

    def classify(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B labels"]:
        """Logits of the classes of each row, read from its last real token; needs `labels` in the config."""
        x_BTC = self.features(tokens_BT, segment_ids_BT)
        B, T = tokens_BT.shape
        real_BT = jnp.ones((B, T), bool) if segment_ids_BT is None else segment_ids_BT != 0
        last_B = T - 1 - jnp.argmax(real_BT[:, ::-1], axis=1)
        return self.score(x_BTC[jnp.arange(B), last_B]).astype(jnp.float32)
