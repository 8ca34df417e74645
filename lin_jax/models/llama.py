"""LLaMA 1, 2 and 3 (Touvron et al., 2023), with softmax or linearized attention."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attentions.augmented import paper_attention
from lin_jax.attentions.base import AttentionConfig, HeadSizes
from lin_jax.attentions.registry import ATTENTIONS, check_attention, make_attention
from lin_jax.layers.embedding import look_up
from lin_jax.layers.linear import Linear
from lin_jax.layers.norms import RMSNorm
from lin_jax.layers.parameter import Path, parameter
from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.layers.rope import RopeConfig, Rotation, rotate_halves, rotation
from lin_jax.layers.rows import place
from lin_jax.layers.stack import stack_layers
from lin_jax.models.base import Decoder, Matrix, ModelConfig, ResidualLayer, check_cache
from lin_jax.settings.base import require, require_positive, section, setting, variants

# Standard deviation of initial matrices.
DEVIATION = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """A LLaMA 1, 2 or 3, with its softmax attention or a linearized one; the defaults are LLaMA-2-7B's."""

    architecture: Literal["llama"] = setting("llama", "which model these settings are of")
    vocabulary_size: int = setting(32000, "tokens V that the model knows", most=2**24)
    width: int = setting(4096, "model width C", most=2**20)
    depth: int = setting(32, "layers L", most=2**12)
    heads: int = setting(32, "query heads H", most=2**12)
    key_value_heads: int = setting(32, "key/value heads K, a divisor of heads", most=2**12)
    head_size: int = setting(128, "query/key and value size D of a head", most=2**16)
    feed_forward_size: int = setting(11008, "feed-forward width F", most=2**22)
    positions: int = setting(4096, "tokens in the longest sequence of pretraining; only rope.scaling=dynamic reads it")
    norm_epsilon: float = setting(1e-5, "added to the mean square in norms")
    rope: RopeConfig = section(RopeConfig, "rotary positions")
    attention_bias: bool = setting(False, "biases in the attention's four projections")
    feed_forward_bias: bool = setting(False, "biases in the feed-forward layer's projections")
    tie_embeddings: bool = setting(False, "the head shares the embedding's matrix")
    attention: AttentionConfig = variants(paper_attention, ATTENTIONS, "the attention of every layer")

    free: ClassVar[tuple[str, ...]] = (*ModelConfig.free, "rope", "positions")

    def _check(self) -> None:
        require_positive(self, "vocabulary_size", "width", "depth", "heads", "key_value_heads", "head_size")
        require_positive(self, "feed_forward_size", "positions", "norm_epsilon")
        require(
            self.heads % self.key_value_heads == 0,
            f"heads={self.heads} is not divisible by key_value_heads={self.key_value_heads}",
        )
        require(self.head_size % 2 == 0, f"head_size must be even (rotated pairs), but is {self.head_size}")
        check_attention(self.attention, self.depth, self.architecture)


class LlamaAttention(nnx.Module):
    """The projections of an attention, rotary positions between, and the attention itself, `mixing`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        C, D, H, K = config.width, config.head_size, config.heads, config.key_value_heads
        options: dict[str, Any] = {
            "bias": config.attention_bias,
            "deviation": DEVIATION,
            "roles": ("attention",),
            "rngs": rngs,
        }
        self.query = Linear(C, H * D, ("width", "heads"), **options)
        self.key = Linear(C, K * D, ("width", "heads"), **options)
        self.value = Linear(C, K * D, ("width", "heads"), **options)
        self.output = Linear(H * D, C, ("heads", "width"), **options)
        self.mixing = make_attention(config.attention, Llama.head_sizes(config), rngs)
        self.head_size = D

    def project(self, x_BTC: Float[Array, "B T C"], turn: Rotation) -> tuple[Array, Array, Array]:
        """Return rotated queries and keys, and values."""
        q_BTHD, k_BTKD = (rotate_halves(self._heads(linear(x_BTC)), turn) for linear in (self.query, self.key))
        return q_BTHD, k_BTKD, self._heads(self.value(x_BTC))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.head_size)

    def join(self, y_BTHE: Float[Array, "B T H E"]) -> Float[Array, "B T C"]:
        """Return the heads' outputs as features."""
        return self.output(y_BTHE.reshape(*y_BTHE.shape[:2], -1))


class SwiGlu(nnx.Module):
    """W_down (SiLU(W_gate x) * W_up x) (Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        C, F = config.width, config.feed_forward_size
        options: dict[str, Any] = {
            "bias": config.feed_forward_bias,
            "deviation": DEVIATION,
            "roles": ("feed_forward",),
            "rngs": rngs,
        }
        self.gate = Linear(C, F, ("width", "feed_forward"), **options)
        self.up = Linear(C, F, ("width", "feed_forward"), **options)
        self.down = Linear(F, C, ("feed_forward", "width"), **options)

    def __call__(self, x_BTC: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """Apply the layer."""
        return self.down(jax.nn.silu(self.gate(x_BTC)) * self.up(x_BTC))


class LlamaLayer(ResidualLayer):
    """Attention and feed-forward layer, each behind a norm and around a residual."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = LlamaAttention(config, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_epsilon)
        self.feed_forward = SwiGlu(config, rngs=rngs)

    def holder(self) -> LlamaAttention:
        """Return the module whose `mixing` is the attention."""
        return self.attention

    def project(
        self, x_BTC: Float[Array, "B T C"], partition: Partition, *shared: Rotation
    ) -> tuple[Array, Array, Array]:
        """Return rotated queries and keys, and values."""
        return self.attention.project(self.attention_norm(x_BTC), *shared)

    def join(self, y_BTHE: Float[Array, "B T H E"]) -> Float[Array, "B T C"]:
        """Return what the attention adds."""
        return self.attention.join(y_BTHE)

    def feed(self, x_BTC: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """Return x with what the feed-forward layer adds."""
        return x_BTC + self.feed_forward(self.feed_forward_norm(x_BTC))

    @property
    def sizes(self) -> HeadSizes:
        """Return the sizes of the attention's heads."""
        return Llama.head_sizes(self.config)


class Llama(Decoder):
    """Token embedding, layers, norm, and a head that may share the embedding's matrix."""

    settings = LlamaConfig
    cut_sizes: ClassVar[dict[str, tuple[str, ...]]] = {
        "heads": ("heads", "key_value_heads"),
        "feed_forward": ("feed_forward_size",),
    }
    conversion = "lin_jax.convert.llama:CONVERSION"
    has_softmax_form = True

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        V, C = config.vocabulary_size, config.width
        self.config = config
        embedding = DEVIATION * jax.random.normal(rngs.params(), (V, C))
        self.embedding = parameter(embedding, ("vocabulary", "width"), decay=True, roles=("embedding",))
        self.layers = stack_layers(lambda rngs: LlamaLayer(config, rngs=rngs), config.depth, rngs)
        self.norm = RMSNorm(C, config.norm_epsilon)
        if not config.tie_embeddings:
            options: dict[str, Any] = {"bias": False, "deviation": DEVIATION, "roles": ("head",), "rngs": rngs}
            self.logits = Linear(C, V, ("width", "vocabulary"), **options)

    def begin(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None, partition: Partition = WHOLE
    ) -> tuple[Any, ...]:
        """Return the embedded tokens of whole rows, their `Rows`, and the rotation of their positions."""
        config, (B, T) = self.config, tokens_BT.shape
        rows = place(segment_ids_BT, (B, T), partition, heads="heads")
        turn = rotation(config.rope, rows.position_BT, config.head_size, config.positions)
        return look_up(self.embedding[...], tokens_BT, partition).astype(config.dtype), rows, turn

    def embed(self, tokens_BT: Int[Array, "B T"], position_BT: Int[Array, "B T"]) -> tuple[Array, tuple[Any, ...]]:
        """Return the embedded tokens that follow a state, and the rotation of their positions."""
        config = self.config
        # Within `positions` dynamic scaling changes nothing, and beyond them it is refused.
        rope = config.rope if config.rope.scaling != "dynamic" else dataclasses.replace(config.rope, scaling="default")
        turn = rotation(rope, position_BT, config.head_size, config.positions)
        return self.embedding[...][tokens_BT], (turn,)

    def check_decodable(self, capacity: int) -> None:
        """Raise `ConfigError` unless sequences of `capacity` tokens can be decoded exactly."""
        config = self.config
        super().check_decodable(capacity)
        check_cache(config, capacity)
        require(
            config.rope.scaling != "dynamic" or capacity <= config.positions,
            f"rope.scaling=dynamic changes what was computed once a sequence exceeds positions={config.positions}, but "
            f"{capacity} tokens are asked for: use fewer, or rope.scaling=linear or llama3",
        )

    def head(self, x_BTC: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        """Return the logits of `features`, float32."""
        if self.config.tie_embeddings:
            return (x_BTC @ self.embedding[...].astype(x_BTC.dtype).T).astype("float32")
        return self.logits(x_BTC).astype("float32")

    @classmethod
    def head_sizes(cls, config: LlamaConfig) -> HeadSizes:
        """Return the sizes of the heads."""
        return HeadSizes(config.heads, config.key_value_heads, config.head_size, config.head_size)

    @classmethod
    def matrices(cls, config: LlamaConfig) -> list[Matrix]:
        """Return the matrices of all layers, in the order in which they are used."""
        C, F, L = config.width, config.feed_forward_size, config.depth
        queries, keys = config.heads * config.head_size, config.key_value_heads * config.head_size
        attention = {"query": (C, queries), "key": (C, keys), "value": (C, keys), "output": (queries, C)}
        feed_forward = {"gate": (C, F), "up": (C, F), "down": (F, C)}
        parts = {"attention": attention, "feed_forward": feed_forward}
        return [
            Matrix(("layers", part, name, "kernel"), *shape, L)
            for part, named in parts.items()
            for name, shape in named.items()
        ]

    @classmethod
    def head_path(cls, config: LlamaConfig) -> Path:
        """Return the path of the matrix that makes the logits."""
        return ("embedding",) if config.tie_embeddings else ("logits", "kernel")
