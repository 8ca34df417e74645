"""T5 (Raffel et al., 2020), v1.0, v1.1 and FLAN: each of its three attentions softmax or linearized on its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attentions.augmented import AugmentedConfig, paper_attention
from lin_jax.attentions.base import AttentionConfig, HeadSizes, Scoring
from lin_jax.attentions.registry import ATTENTIONS, attention_of_kind, check_attention, make_attention
from lin_jax.layers.dropout import DROPOUT_DOC, check_dropout, dropout, split_key
from lin_jax.layers.embedding import look_up
from lin_jax.layers.linear import Linear
from lin_jax.layers.norms import RMSNorm
from lin_jax.layers.parameter import Path, parameter
from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.layers.positions import bias_buckets
from lin_jax.layers.rows import Rows, place
from lin_jax.layers.stack import stack_layers
from lin_jax.models.base import (
    LABEL_NAMES_DOC,
    LABELS_DOC,
    Matrix,
    ModelConfig,
    ResidualLayer,
    check_labels,
)
from lin_jax.models.encoder_decoder import EncoderDecoder, Memory, MemoryLayer, shift_right
from lin_jax.ops.tree import Tree
from lin_jax.settings.base import ConfigError, require, require_at_least_zero, require_positive, setting, variants


def _both_ways() -> AttentionConfig:
    return AugmentedConfig(group_size=64, causal=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(ModelConfig):
    """A T5, with its softmax attentions or linearized ones; the defaults are those of T5-base, v1.0."""

    architecture: Literal["t5"] = setting("t5", "which model these settings are of")
    vocabulary_size: int = setting(32128, "tokens V that the model knows", most=2**24)
    width: int = setting(768, "model width C", most=2**20)
    depth: int = setting(12, "layers L of the decoder", most=2**12)
    encoder_depth: int = setting(12, "layers of the encoder", most=2**12)
    heads: int = setting(12, "heads H", most=2**12)
    head_size: int = setting(64, "query/key and value size D of a head; need not be width / heads", most=2**16)
    feed_forward_size: int = setting(3072, "feed-forward width F", most=2**22)
    feed_forward: Literal["relu", "gated_gelu"] = setting("relu", "relu is v1.0's; gated_gelu that of v1.1 and FLAN")
    norm_epsilon: float = setting(1e-6, "added to the mean square in norms")
    bias_buckets: int = setting(32, "buckets of the relative position bias", most=2**16)
    bias_distance: int = setting(128, "distance from which on all positions share the last bucket", most=2**24)
    tie_embeddings: bool = setting(True, "the head shares the embedding's matrix, as in v1.0")
    scale_head: bool = setting(True, "divide what the head reads by sqrt(width), as v1.0 does")
    start_token: int = setting(0, "token before a target's first one; T5's is its padding")
    dropout: float = setting(0.0, DROPOUT_DOC)
    labels: int = setting(0, LABELS_DOC, most=2**20)
    label_names: tuple[str, ...] = setting((), LABEL_NAMES_DOC)
    attention: AttentionConfig = variants(paper_attention, ATTENTIONS, "the attention of the decoder to its own tokens")
    encoder_attention: AttentionConfig = variants(_both_ways, ATTENTIONS, "the attention of the encoder")
    cross_attention: AttentionConfig = variants(
        _both_ways, ATTENTIONS, "the attention of the decoder to the encoder's tokens"
    )

    attention_fields: ClassVar[tuple[str, ...]] = ("attention", "encoder_attention", "cross_attention")
    free: ClassVar[tuple[str, ...]] = (*attention_fields, "dtype", "remat", "start_token")

    def _check(self) -> None:
        require_positive(self, "vocabulary_size", "width", "depth", "encoder_depth", "heads", "head_size")
        require_positive(self, "feed_forward_size", "norm_epsilon")
        require_at_least_zero(self, "start_token")
        check_labels(self)
        check_dropout(self.dropout)
        require(
            self.start_token < self.vocabulary_size,
            f"start_token={self.start_token} is no token of vocabulary_size={self.vocabulary_size}",
        )
        require(
            self.bias_buckets >= 4 and self.bias_buckets % 4 == 0,
            f"bias_buckets must be a positive multiple of 4, but is {self.bias_buckets}",
        )
        require(
            self.bias_distance > self.bias_buckets // 2,
            f"bias_distance={self.bias_distance} must be more than bias_buckets / 2, {self.bias_buckets // 2}",
        )
        name = self.architecture
        check_attention(self.attention, self.depth, name, bias=True)
        encoder: dict[str, Any] = {"name": "encoder_attention", "causal": False, "bias": True}
        check_attention(self.encoder_attention, self.encoder_depth, name, **encoder)
        check_attention(self.cross_attention, self.depth, name, name="cross_attention", causal=False, memory=True)

    def check_segments(self) -> None:
        """Raise `ConfigError`: a source and its target are rows of their own."""
        raise ConfigError(f"data.packing=segments is not for {self.architecture}, whose rows are a source and a target")


class T5Attention(nnx.Module):
    """Four projections without bias, and the attention between them, `mixing`."""

    def __init__(self, config: T5Config, attention: AttentionConfig, *, of_memory: bool = False, rngs: nnx.Rngs):
        C, inner, sizes = config.width, config.heads * config.head_size, T5.head_sizes(config)

        def linear(inputs: int, outputs: int, axes: tuple[str, str], fan: int) -> Linear:
            options: dict[str, Any] = {"bias": False, "roles": ("attention",), "rngs": rngs}
            return Linear(inputs, outputs, axes, deviation=fan**-0.5, **options)

        # Scores are not divided by sqrt(D): the queries' matrix starts smaller instead.
        self.query = linear(C, inner, ("width", "heads"), C * config.head_size)
        self.key = linear(C, inner, ("width", "heads"), C)
        self.value = linear(C, inner, ("width", "heads"), C)
        self.output = linear(inner, C, ("heads", "width"), inner)
        self.mixing = make_attention(attention, sizes, rngs, of_memory=of_memory)
        self.head_size = config.head_size

    def queries(self, x_BTC: Float[Array, "B T C"]) -> Float[Array, "B T H D"]:
        """Return the queries of tokens."""
        return self._heads(self.query(x_BTC))

    def keys_and_values(self, x_BSC: Float[Array, "B S C"]) -> tuple[Float[Array, "B S H D"], Float[Array, "B S H E"]]:
        """Return the keys and values of tokens."""
        return self._heads(self.key(x_BSC)), self._heads(self.value(x_BSC))

    def join(self, y_BTHE: Float[Array, "B T H E"]) -> Float[Array, "B T C"]:
        """Return the heads' outputs as features."""
        return self.output(y_BTHE.reshape(*y_BTHE.shape[:2], -1))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.head_size)


class T5FeedForward(nnx.Module):
    """W_down relu(W_up x), or with a gate W_down (gelu(W_gate x) * W_up x) (Shazeer, 2020)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        C, F = config.width, config.feed_forward_size
        options: dict[str, Any] = {"bias": False, "roles": ("feed_forward",), "rngs": rngs}
        self.gated, self.rate = config.feed_forward == "gated_gelu", config.dropout
        if self.gated:
            self.gate = Linear(C, F, ("width", "feed_forward"), deviation=C**-0.5, **options)
        self.up = Linear(C, F, ("width", "feed_forward"), deviation=C**-0.5, **options)
        self.down = Linear(F, C, ("feed_forward", "width"), deviation=F**-0.5, **options)

    def __call__(self, x_BTC: Float[Array, "B T C"], dropout_key: Array | None = None) -> Float[Array, "B T C"]:
        """Apply the layer."""
        of_inner, of_output = split_key(dropout_key, 2)
        if self.gated:
            # gelu_new is the approximation by tanh.
            wide_BTF = jax.nn.gelu(self.gate(x_BTC), approximate=True) * self.up(x_BTC)
        else:
            wide_BTF = jax.nn.relu(self.up(x_BTC))
        return dropout(self.down(dropout(wide_BTF, self.rate, of_inner)), self.rate, of_output)


class T5EncoderLayer(ResidualLayer):
    """Attention and feed-forward layer, each behind a norm and around a residual."""

    def __init__(self, config: T5Config, attention: AttentionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = T5Attention(config, attention, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_epsilon)
        self.feed_forward = T5FeedForward(config, rngs=rngs)

    def holder(self) -> T5Attention:
        """Return the module whose `mixing` is the attention."""
        return self.attention

    def scoring(self, *shared: Any) -> Scoring:
        """Return how keys are scored: by q . k, with the bias that all layers share, the first of what they are told.

        The scores of normalised queries and keys, those of relu2 and laplace, take the bias too: with softmax they are
        what T5 computes.
        """
        return Scoring(1.0, shared[0])

    def project(self, x_BTC: Float[Array, "B T C"], partition: Partition, *shared: Any) -> tuple[Array, Array, Array]:
        """Return queries, keys and values."""
        normal_BTC = self.attention_norm(x_BTC)
        return self.attention.queries(normal_BTC), *self.attention.keys_and_values(normal_BTC)

    def join(self, y_BTHE: Float[Array, "B T H E"]) -> Float[Array, "B T C"]:
        """Return what the attention adds."""
        return self.attention.join(y_BTHE)

    def feed(self, x_BTC: Float[Array, "B T C"], dropout_key: Array | None = None) -> Float[Array, "B T C"]:
        """Return x with what the feed-forward layer adds."""
        return x_BTC + self.feed_forward(self.feed_forward_norm(x_BTC), dropout_key)

    @property
    def sizes(self) -> HeadSizes:
        """Return the sizes of the attention's heads."""
        return T5.head_sizes(self.config)


class T5LayerState(NamedTuple):
    """What a layer of the decoder knows: `own` of the target's tokens so far, `memory` of the whole source."""

    own: Any
    memory: Any


class T5DecoderLayer(T5EncoderLayer, MemoryLayer):
    """The same, with attention to the source in between."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        super().__init__(config, config.attention, rngs=rngs)
        self.cross_norm = RMSNorm(config.width, config.norm_epsilon)
        self.cross = T5Attention(config, config.cross_attention, of_memory=True, rngs=rngs)

    def of_kind(self, kind: tuple[str, str]) -> Any:
        """Return the layer with attentions of these kinds, to its own tokens and to the source."""
        own, cross = kind
        layer, mixing = super().of_kind(own), attention_of_kind(self.cross.mixing, cross)
        if mixing is self.cross.mixing:
            return layer
        other = nnx.merge(*nnx.split(layer))
        other.cross.mixing = mixing
        return other

    def __call__(
        self, x_BTC: Float[Array, "B T C"], rows: Rows, *shared: Any, dropout_key: Array | None = None
    ) -> Float[Array, "B T C"]:
        """Apply the layer to whole rows; what it is told is the bias, and the memory."""
        rate, (of_attention, of_cross, of_feed) = self.config.dropout, split_key(dropout_key, 3)
        x_BTC = x_BTC + dropout(self.attend(x_BTC, rows, *shared), rate, of_attention)
        return self.feed(x_BTC + dropout(self.read(x_BTC, rows, shared[1]), rate, of_cross), of_feed)

    def read(self, x_BTC: Float[Array, "B T C"], rows: Rows, memory: Memory) -> Float[Array, "B T C"]:
        """Return what attention to the source adds in whole rows."""
        ids_BT = rows.segment_ids_BT
        own = rows if ids_BT is None else rows._replace(segment_ids_BT=(ids_BT != 0).astype(jnp.int32))
        q_BTHD, (k_BSKD, v_BSKE) = self._cross_queries(x_BTC), self.cross.keys_and_values(memory.x_BSC)
        return self.cross.join(self.cross.mixing(q_BTHD, k_BSKD, v_BSKE, own, memory.rows, Scoring(1.0)))

    def _cross_queries(self, x_BTC: Array) -> Array:
        return self.cross.queries(self.cross_norm(x_BTC))

    def start(self, memory: Memory, capacity: int) -> T5LayerState:
        """Return the state before the first token, see `MemoryLayer`."""
        own = self.empty_state(memory.x_BSC.shape[0], capacity)
        return T5LayerState(own, self.cross.mixing.memory_state(*self.cross.keys_and_values(memory.x_BSC), memory.rows))

    def extend(
        self, x_BTC: Float[Array, "B T C"], state: T5LayerState, count_B: Int[Array, " B"], *shared: Any
    ) -> tuple[Float[Array, "B T C"], T5LayerState]:
        """Apply the layer to tokens that follow a state."""
        operands = self.project(x_BTC, WHOLE)
        y_BTHE, after = self.attention.mixing.extend(*operands, state.own, count_B, self.scoring(*shared))
        return self._after(x_BTC, y_BTHE, state), T5LayerState(after, state.memory)

    def verify(
        self, x_BMC: Float[Array, "B M C"], state: T5LayerState, tree: Tree, *shared: Any
    ) -> tuple[Float[Array, "B M C"], Any]:
        """Apply the layer to the nodes of a tree that follows a state."""
        operands = self.project(x_BMC, WHOLE)
        y_BMHE, pending = self.attention.mixing.verify(*operands, state.own, tree, self.scoring(*shared))
        return self._after(x_BMC, y_BMHE, state), pending

    def _after(self, x_BTC: Array, y_BTHE: Array, state: T5LayerState) -> Array:
        """Return the layer's output, of what its attention to the target's own tokens gave."""
        x_BTC = x_BTC + self.join(y_BTHE)
        read_BTHE = self.cross.mixing.attend_memory(self._cross_queries(x_BTC), state.memory, Scoring(1.0))
        return self.feed(x_BTC + self.cross.join(read_BTHE))

    def commit(
        self, state: T5LayerState, pending: Any, path_BM: Int[Array, "B M"], count_B: Int[Array, " B"]
    ) -> T5LayerState:
        """Return the state after the first `count_B` nodes of each row's path."""
        return T5LayerState(self.attention.mixing.commit(state.own, pending, path_BM, count_B), state.memory)

    def take(self, state: T5LayerState, row_B: Int[Array, " B"]) -> T5LayerState:
        """Return a state whose rows are these of another; what is known of the source stays, as it is the same."""
        return T5LayerState(super().take(state.own, row_B), state.memory)


class T5ClassHead(nnx.Module):
    """score(tanh(dense(x))), transformers' head of a T5 that classifies."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        C = config.width
        options: dict[str, Any] = {"deviation": 0.05, "roles": ("head",), "rngs": rngs}
        self.rate = config.dropout
        self.dense = Linear(C, C, ("width", None), **options)
        self.score = Linear(C, config.labels, ("width", None), **options)

    def __call__(self, x_BC: Float[Array, "B C"], dropout_key: Array | None = None) -> Float[Array, "B labels"]:
        """Return the logits of the classes."""
        of_input, of_inner = split_key(dropout_key, 2)
        inner_BC = jnp.tanh(self.dense(dropout(x_BC, self.rate, of_input)))
        return self.score(dropout(inner_BC, self.rate, of_inner)).astype(jnp.float32)


class T5(EncoderDecoder):
    """Token embedding, encoder, decoder, a bias by distance for each of both, and a head.

    Source: the model of transformers; its weights are read and written by `lin_jax.convert.t5`.
    """

    settings = T5Config
    cut_sizes: ClassVar[dict[str, tuple[str, ...]]] = {"heads": ("heads",), "feed_forward": ("feed_forward_size",)}
    conversion = "lin_jax.convert.t5:CONVERSION"
    plain_scores = False
    can_classify = True
    classifier = ("classes",)

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        V, C = config.vocabulary_size, config.width
        self.config = config
        table: dict[str, Any] = {"decay": True, "roles": ("embedding",)}
        # Features are scaled down before a tied head, or the embedding would make logits of sqrt(C).
        self.embedding = parameter(jax.random.normal(rngs.params(), (V, C)), ("vocabulary", "width"), **table)
        self.encoder_bias, self.bias = (self._new_bias(config, rngs) for _ in range(2))
        self.encoder_layers = stack_layers(
            lambda rngs: T5EncoderLayer(config, config.encoder_attention, rngs=rngs), config.encoder_depth, rngs
        )
        self.encoder_norm = RMSNorm(C, config.norm_epsilon)
        self.layers = stack_layers(lambda rngs: T5DecoderLayer(config, rngs=rngs), config.depth, rngs)
        self.norm = RMSNorm(C, config.norm_epsilon)
        if not config.tie_embeddings:
            options: dict[str, Any] = {"bias": False, "deviation": C**-0.5, "roles": ("head",), "rngs": rngs}
            self.logits = Linear(C, V, ("width", "vocabulary"), **options)
        if config.labels:
            self.classes = T5ClassHead(config, rngs=rngs)

    @staticmethod
    def _new_bias(config: T5Config, rngs: nnx.Rngs) -> nnx.Param:
        start = config.width**-0.5 * jax.random.normal(rngs.params(), (config.bias_buckets, config.heads))
        return parameter(start, (None, "heads"), roles=("attention",))

    def begin_source(self, source_BS: Int[Array, "B S"], source_ids_BS: Any, partition: Partition) -> tuple[Any, ...]:
        """Return the embedded source, its `Rows`, and the encoder's bias by distance."""
        (B, S) = source_BS.shape
        rows = place(source_ids_BS, (B, S), partition, heads="heads")
        x_BSC = look_up(self.embedding[...], source_BS, partition).astype(self.config.dtype)
        return x_BSC, rows, self._by_distance(self.encoder_bias, causal=False)

    def begin(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None, partition: Partition = WHOLE
    ) -> tuple[Any, ...]:
        """Return the embedded target, its `Rows`, and the decoder's bias by distance."""
        (B, T) = tokens_BT.shape
        rows = place(segment_ids_BT, (B, T), partition, heads="heads")
        x_BTC = look_up(self.embedding[...], tokens_BT, partition).astype(self.config.dtype)
        return x_BTC, rows, self._by_distance(self.bias, causal=True)

    def embed(self, tokens_BT: Int[Array, "B T"], position_BT: Int[Array, "B T"]) -> tuple[Array, tuple[Any, ...]]:
        """Return the embedded tokens, and the decoder's bias by distance."""
        return self.embedding[...][tokens_BT], (self._by_distance(self.bias, causal=True),)

    def _by_distance(self, table: nnx.Param, *, causal: bool) -> Float[Array, "X H"]:
        """Return the bias of every distance up to the one from which on it stays the same, see `Scoring`."""
        config, far = self.config, self.config.bias_distance
        distance = np.arange(0 if causal else -far, far + 1)
        return table[...][bias_buckets(distance, config.bias_buckets, far, causal)]

    @property
    def layer_kinds(self) -> Sequence[tuple[str, str]]:
        """Return the kinds of each layer's attentions, to its own tokens and to the source."""
        config = self.config
        own, cross = (attention.kinds(config.depth) for attention in (config.attention, config.cross_attention))
        return list(zip(own, cross, strict=True))

    @property
    def encoder_kinds(self) -> Sequence[str]:
        """Return the kind of each of the encoder's attentions."""
        return self.config.encoder_attention.kinds(self.config.encoder_depth)

    def check_decodable(self, capacity: int) -> None:
        """Raise `ConfigError` unless targets can be decoded exactly."""
        super().check_decodable(capacity)
        cross = self.config.cross_attention
        # Cross attention sees all of the source, and is as causal as it can be.
        reason = ATTENTIONS[cross.kind].undecodable(dataclasses.replace(cross, causal=True))
        require(reason is None, f"cross_attention: {reason}")

    def head(self, x_BTC: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        """Return the logits of `features`, float32."""
        config = self.config
        x_BTC = x_BTC * config.width**-0.5 if config.scale_head else x_BTC
        if config.tie_embeddings:
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
        """Return logits of the classes of each row, as transformers' T5ForSequenceClassification does.

        The row is the source and the target too, and its last real token, which ends the text, is read. Needs `labels`
        in the config.
        """
        of_source, of_target, of_head = split_key(dropout_key, 3)
        memory = self.encode(tokens_BT, segment_ids_BT, partition, dropout_key=of_source)
        target_BT = shift_right(tokens_BT, segment_ids_BT, self.config.start_token)
        x_BTC = self.features(target_BT, segment_ids_BT, partition, memory=memory, dropout_key=of_target)
        B, T = tokens_BT.shape
        real_BT = jnp.ones((B, T), bool) if segment_ids_BT is None else segment_ids_BT != 0
        last_B = T - 1 - jnp.argmax(real_BT[:, ::-1], axis=1)
        return self.classes(x_BTC[jnp.arange(B), last_B], of_head)

    @classmethod
    def head_sizes(cls, config: T5Config) -> HeadSizes:
        """Return the sizes of the heads, the same in all attentions."""
        return HeadSizes(config.heads, config.heads, config.head_size, config.head_size)

    @classmethod
    def matrices(cls, config: T5Config) -> list[Matrix]:
        """Return the matrices of the decoder that a token of the target is multiplied with, in the order of their use.

        The keys and values of the source are in `source_matrices`.
        """
        C, inner, L = config.width, config.heads * config.head_size, config.depth
        own = [("query", C, inner), ("key", C, inner), ("value", C, inner), ("output", inner, C)]
        cross = [("query", C, inner), ("output", inner, C)]
        named = [("attention", own), ("cross", cross), ("feed_forward", cls._feed_forward_shapes(config))]
        return [Matrix(("layers", part, name, "kernel"), m, n, L) for part, of in named for name, m, n in of]

    @classmethod
    def source_matrices(cls, config: T5Config) -> list[Matrix]:
        """Return the matrices of the encoder, and those of the keys and values of the decoder's cross attention."""
        C, inner = config.width, config.heads * config.head_size
        own = [("query", C, inner), ("key", C, inner), ("value", C, inner), ("output", inner, C)]
        encoder = [
            Matrix(("encoder_layers", part, name, "kernel"), inputs, outputs, config.encoder_depth)
            for part, of in (("attention", own), ("feed_forward", cls._feed_forward_shapes(config)))
            for name, inputs, outputs in of
        ]
        cross = [Matrix(("layers", "cross", name, "kernel"), C, inner, config.depth) for name in ("key", "value")]
        return encoder + cross

    @staticmethod
    def _feed_forward_shapes(config: T5Config) -> list[tuple[str, int, int]]:
        C, F = config.width, config.feed_forward_size
        gate = [("gate", C, F)] if config.feed_forward == "gated_gelu" else []
        return [*gate, ("up", C, F), ("down", F, C)]

    @classmethod
    def head_path(cls, config: T5Config) -> Path:
        """Return the path of the matrix that makes the logits."""
        return ("embedding",) if config.tie_embeddings else ("logits", "kernel")
