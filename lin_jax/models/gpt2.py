"""GPT-2 (Radford et al., 2019), with softmax or linearized attention, as a language model or a classifier."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attentions.augmented import paper_attention
from lin_jax.attentions.base import AttentionConfig, HeadSizes
from lin_jax.attentions.registry import ATTENTIONS, check_attention, make_attention
from lin_jax.layers.dropout import DROPOUT_DOC, check_dropout, dropout
from lin_jax.layers.embedding import look_up
from lin_jax.layers.linear import Linear
from lin_jax.layers.norms import LayerNorm
from lin_jax.layers.parameter import Path, parameter
from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.layers.rows import place
from lin_jax.layers.stack import stack_layers
from lin_jax.models.base import (
    LABEL_NAMES_DOC,
    LABELS_DOC,
    Decoder,
    Matrix,
    ModelConfig,
    ResidualLayer,
    check_cache,
    check_labels,
)
from lin_jax.settings.base import require, require_positive, setting, variants

# Standard deviation of initial matrices; the two that write to the residual have it divided by sqrt(2 L).
DEVIATION = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpt2Config(ModelConfig):
    """A GPT-2, with its softmax attention or a linearized one; the defaults are those of the 124M model."""

    architecture: Literal["gpt2"] = setting("gpt2", "which model these settings are of")
    vocabulary_size: int = setting(50257, "tokens V that the model knows", most=2**24)
    width: int = setting(768, "model width C, a multiple of heads", most=2**20)
    depth: int = setting(12, "layers L", most=2**12)
    heads: int = setting(12, "heads H", most=2**12)
    feed_forward_size: int = setting(3072, "feed-forward width F", most=2**22)
    positions: int = setting(1024, "learned positions, and so tokens in the longest row", most=2**24)
    norm_epsilon: float = setting(1e-5, "added to the variance in norms")
    tie_embeddings: bool = setting(True, "the head shares the embedding's matrix")
    dropout: float = setting(0.0, DROPOUT_DOC)
    labels: int = setting(0, LABELS_DOC, most=2**20)
    label_names: tuple[str, ...] = setting((), LABEL_NAMES_DOC)
    attention: AttentionConfig = variants(paper_attention, ATTENTIONS, "the attention of every layer")

    free: ClassVar[tuple[str, ...]] = (*ModelConfig.free, "positions")

    def _check(self) -> None:
        require_positive(self, "vocabulary_size", "width", "depth", "heads", "feed_forward_size", "positions")
        require_positive(self, "norm_epsilon")
        check_labels(self)
        check_dropout(self.dropout)
        require(self.width % self.heads == 0, f"width={self.width} is not divisible by heads={self.heads}")
        check_attention(self.attention, self.depth, self.architecture)

    @property
    def head_size(self) -> int:
        """Query/key and value size D of a head."""
        return self.width // self.heads

    @property
    def row_limit(self) -> int:
        """Return the learned positions."""
        return self.positions


class Gpt2Layer(ResidualLayer):
    """Attention and feed-forward layer, each behind a norm and around a residual."""

    def __init__(self, config: Gpt2Config, *, rngs: nnx.Rngs):
        C, F = config.width, config.feed_forward_size
        residual = DEVIATION / (2 * config.depth) ** 0.5
        attention: dict[str, Any] = {"roles": ("attention",), "rngs": rngs}
        feed_forward: dict[str, Any] = {"roles": ("feed_forward",), "rngs": rngs}
        self.config = config
        self.attention_norm = LayerNorm(C, config.norm_epsilon)
        self.query_key_value = Linear(C, 3 * C, ("width", "heads"), deviation=DEVIATION, **attention)
        self.mixing = make_attention(config.attention, Gpt2.head_sizes(config), rngs)
        self.output = Linear(C, C, ("heads", "width"), deviation=residual, **attention)
        self.feed_forward_norm = LayerNorm(C, config.norm_epsilon)
        self.up = Linear(C, F, ("width", "feed_forward"), deviation=DEVIATION, **feed_forward)
        self.down = Linear(F, C, ("feed_forward", "width"), deviation=residual, **feed_forward)

    def project(self, x_BTC: Float[Array, "B T C"], partition: Partition, *shared: Any) -> tuple[Array, Array, Array]:
        """Return queries, keys and values."""
        joint = self.query_key_value.parts(self.attention_norm(x_BTC), 3, partition)
        q, k, v = (x.reshape(*x.shape[:2], self.config.heads, -1) for x in joint)
        return q, k, v

    def join(self, y_BTHE: Float[Array, "B T H E"]) -> Float[Array, "B T C"]:
        """Return what the attention adds."""
        return self.output(y_BTHE.reshape(*y_BTHE.shape[:2], -1))

    def feed(self, x_BTC: Float[Array, "B T C"], dropout_key: Array | None = None) -> Float[Array, "B T C"]:
        """Return x with what the feed-forward layer adds."""
        # gelu_new is the approximation by tanh.
        wide_BTF = jax.nn.gelu(self.up(self.feed_forward_norm(x_BTC)), approximate=True)
        return x_BTC + dropout(self.down(wide_BTF), self.config.dropout, dropout_key)

    @property
    def sizes(self) -> HeadSizes:
        """Return the sizes of the attention's heads."""
        return Gpt2.head_sizes(self.config)


class Gpt2(Decoder):
    """Token and position embeddings, layers, norm, and a head that nearly always shares the tokens' matrix."""

    settings = Gpt2Config
    cut_sizes: ClassVar[dict[str, tuple[str, ...]]] = {"heads": ("heads",), "feed_forward": ("feed_forward_size",)}
    conversion = "lin_jax.convert.gpt2:CONVERSION"
    has_softmax_form = can_classify = True
    classifier = ("score",)

    def __init__(self, config: Gpt2Config, *, rngs: nnx.Rngs):
        V, C = config.vocabulary_size, config.width
        self.config = config
        embedding = DEVIATION * jax.random.normal(rngs.params(), (V, C))
        positions = DEVIATION * jax.random.normal(rngs.params(), (config.positions, C))
        table: dict[str, Any] = {"decay": True, "roles": ("embedding",)}
        self.embedding = parameter(embedding, ("vocabulary", "width"), **table)
        self.position_embedding = parameter(positions, ("positions", "width"), **table)
        self.layers = stack_layers(lambda rngs: Gpt2Layer(config, rngs=rngs), config.depth, rngs)
        self.norm = LayerNorm(C, config.norm_epsilon)
        options: dict[str, Any] = {"bias": False, "deviation": DEVIATION, "roles": ("head",), "rngs": rngs}
        if not config.tie_embeddings:
            self.logits = Linear(C, V, ("width", "vocabulary"), **options)
        if config.labels:
            self.score = Linear(C, config.labels, ("width", None), **options)

    def begin(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None, partition: Partition = WHOLE
    ) -> tuple[Any, ...]:
        """Return the embedded tokens of whole rows, and their `Rows`."""
        config, (B, T) = self.config, tokens_BT.shape
        require(config.positions >= T, f"rows of {T} tokens are longer than the model's positions={config.positions}")
        rows = place(segment_ids_BT, (B, T), partition, heads="heads")
        return self.embed(tokens_BT, rows.position_BT, partition)[0].astype(config.dtype), rows

    def embed(
        self, tokens_BT: Int[Array, "B T"], position_BT: Int[Array, "B T"], partition: Partition = WHOLE
    ) -> tuple[Array, tuple[Any, ...]]:
        """Return the embedded tokens, and what all layers are told of positions: nothing."""
        x_BTC = look_up(self.embedding[...], tokens_BT, partition).astype(jnp.float32)
        return x_BTC + self.position_embedding[...][position_BT], ()

    def check_decodable(self, capacity: int) -> None:
        """Raise `ConfigError` unless sequences of `capacity` tokens can be decoded exactly."""
        positions = self.config.positions
        super().check_decodable(capacity)
        check_cache(self.config, capacity)
        require(capacity <= positions, f"{capacity} tokens exceed the model's positions={positions}: ask for fewer")

    def head(self, x_BTC: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        """Return the logits of `features`, float32."""
        if self.config.tie_embeddings:
            return (x_BTC @ self.embedding[...].astype(x_BTC.dtype).T).astype(jnp.float32)
        return self.logits(x_BTC).astype(jnp.float32)

    def classify(
        self,
        tokens_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"] | None = None,
        partition: Partition = WHOLE,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B labels"]:
        """Return logits of the classes of each row, read from its last real token; needs `labels` in the config."""
        x_BTC = self.features(tokens_BT, segment_ids_BT, partition, dropout_key=dropout_key)
        B, T = tokens_BT.shape
        real_BT = jnp.ones((B, T), bool) if segment_ids_BT is None else segment_ids_BT != 0
        last_B = T - 1 - jnp.argmax(real_BT[:, ::-1], axis=1)
        return self.score(x_BTC[jnp.arange(B), last_B]).astype(jnp.float32)

    @classmethod
    def head_sizes(cls, config: Gpt2Config) -> HeadSizes:
        """Return the sizes of the heads."""
        return HeadSizes(config.heads, config.heads, config.head_size, config.head_size)

    @classmethod
    def matrices(cls, config: Gpt2Config) -> list[Matrix]:
        """Return the matrices of all layers, in the order in which they are used."""
        C, F = config.width, config.feed_forward_size
        shapes = {"query_key_value": (C, 3 * C), "output": (C, C), "up": (C, F), "down": (F, C)}
        return [Matrix(("layers", name, "kernel"), *shape, config.depth) for name, shape in shapes.items()]

    @classmethod
    def head_path(cls, config: Gpt2Config) -> Path:
        """Return the path of the matrix that makes the logits."""
        return ("embedding",) if config.tie_embeddings else ("logits", "kernel")
