"""LLaMA 1, 2 and 3 (Touvron et al., 2023), with softmax or linearized attention."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.config import LlamaConfig
from lin_jax.layers.attention import Mixing, layer_kinds
from lin_jax.layers.gated_attention import Rows, place
from lin_jax.layers.linear import Linear
from lin_jax.layers.norms import RMSNorm
from lin_jax.layers.parameter import parameter
from lin_jax.layers.rope import Rotation, rotate_halves, rotation
from lin_jax.layers.stack import run_layers, stack_layers

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
        B, T, _ = x_BTC.shape
        heads = lambda x: x.reshape(B, T, -1, self.config.head_size)  # noqa: E731
        q_BTHD = rotate_halves(heads(self.query(x_BTC)), rotation)
        k_BTKD = rotate_halves(heads(self.key(x_BTC)), rotation)
        y_BTHD = self.mixing(q_BTHD, k_BTKD, heads(self.value(x_BTC)), rows, kind)
        return self.output(y_BTHD.reshape(B, T, -1))


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


class Llama(nnx.Module):
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
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T C"]:
        """What the head reads, in the compute type.

        Args:
            tokens_BT: token ids.
            segment_ids_BT: every run of equal ids is a sequence of its own, 0 is padding; None: a row is a sequence.
        """
        config = self.config
        x_BTC, *shared = self.embed(tokens_BT, segment_ids_BT)
        kinds = layer_kinds(config.attention, config.depth)
        return self.norm(run_layers(self.layers, x_BTC, *shared, remat=config.remat, kinds=kinds))

    def embed(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T C"], Rows, Rotation]:
        """What the first layer reads, and what all layers are told."""
        config, (B, T) = self.config, tokens_BT.shape
        rows = place(segment_ids_BT, (B, T), "exact")
        turn = rotation(config.rope, rows.position_BT, config.head_size, config.positions)
        return self.embedding[...][tokens_BT].astype(config.dtype), rows, turn

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
