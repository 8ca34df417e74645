"""BERT (Devlin et al., 2018), with softmax or linearized attention: features, classes, and masked tokens."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attentions.augmented import AugmentedConfig
from lin_jax.attentions.base import AttentionConfig, HeadSizes
from lin_jax.attentions.registry import ATTENTIONS, check_attention, make_attention
from lin_jax.layers.dropout import DROPOUT_DOC, check_dropout, dropout, split_key
from lin_jax.layers.embedding import look_up
from lin_jax.layers.linear import Linear
from lin_jax.layers.norms import LayerNorm
from lin_jax.layers.parameter import Path, parameter
from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.layers.rows import place
from lin_jax.layers.stack import run_layers, stack_layers
from lin_jax.models.base import (
    LABEL_NAMES_DOC,
    LABELS_DOC,
    Matrix,
    Model,
    ModelConfig,
    ResidualLayer,
    check_labels,
)
from lin_jax.settings.base import require, require_positive, setting, variants

# Standard deviation of initial matrices.
DEVIATION = 0.02
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def _both_ways() -> AttentionConfig:
    return AugmentedConfig(group_size=64, causal=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(ModelConfig):
    """A BERT, with its softmax attention or a linearized one; the defaults are those of BERT-base, uncased."""

    architecture: Literal["bert"] = setting("bert", "which model these settings are of")
    vocabulary_size: int = setting(30522, "tokens V that the model knows", most=2**24)
    width: int = setting(768, "model width C, a multiple of heads", most=2**20)
    depth: int = setting(12, "layers L", most=2**12)
    heads: int = setting(12, "heads H", most=2**12)
    feed_forward_size: int = setting(3072, "feed-forward width F", most=2**22)
    activation: Literal["gelu", "gelu_new", "relu"] = setting(
        "gelu", "of the feed-forward layer; gelu_new approximates gelu by tanh"
    )
    positions: int = setting(512, "learned positions, and so tokens in the longest row", most=2**24)
    token_types: int = setting(2, "learned types of tokens: those of the first text of a pair, and of the second")
    norm_epsilon: float = setting(1e-12, "added to the variance in norms")
    pooler: bool = setting(True, "a layer on the first token's features, which classes are read from")
    masked_head: bool = setting(True, "a head that predicts masked tokens")
    next_sentence: bool = setting(False, "BERT's second head of pretraining, which is kept and not used")
    tie_embeddings: bool = setting(True, "the head of masked tokens shares the embedding's matrix")
    dropout: float = setting(0.0, DROPOUT_DOC)
    labels: int = setting(0, LABELS_DOC, most=2**20)
    label_names: tuple[str, ...] = setting((), LABEL_NAMES_DOC)
    attention: AttentionConfig = variants(_both_ways, ATTENTIONS, "the attention of every layer")

    # Heads are what a run adds to a model, or leaves behind.
    free: ClassVar[tuple[str, ...]] = (*ModelConfig.free, "pooler", "masked_head", "next_sentence")

    def _check(self) -> None:
        require_positive(self, "vocabulary_size", "width", "depth", "heads", "feed_forward_size", "positions")
        require_positive(self, "token_types", "norm_epsilon")
        check_labels(self)
        check_dropout(self.dropout)
        require(self.width % self.heads == 0, f"width={self.width} is not divisible by heads={self.heads}")
        require(self.pooler or not self.labels, "labels need a pooler: set pooler=True")
        require(self.pooler or not self.next_sentence, "next_sentence needs a pooler: set pooler=True")
        check_attention(self.attention, self.depth, self.architecture, causal=False)

    def with_classes(self, labels: int, label_names: tuple[str, ...]) -> "BertConfig":
        """Return the settings with a head of these classes and the pooler before it, without heads of pretraining."""
        plain = dataclasses.replace(self, pooler=True, masked_head=False, next_sentence=False)
        return dataclasses.replace(plain, labels=labels, label_names=label_names)

    @property
    def head_size(self) -> int:
        """Query/key and value size D of a head."""
        return self.width // self.heads

    @property
    def row_limit(self) -> int:
        """Return the learned positions."""
        return self.positions


class BertLayer(ResidualLayer):
    """Attention and feed-forward layer, each around a residual and before a norm."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        C, F = config.width, config.feed_forward_size
        attention: dict[str, Any] = {"deviation": DEVIATION, "roles": ("attention",), "rngs": rngs}
        feed_forward: dict[str, Any] = {"deviation": DEVIATION, "roles": ("feed_forward",), "rngs": rngs}
        self.config = config
        self.query = Linear(C, C, ("width", "heads"), **attention)
        self.key = Linear(C, C, ("width", "heads"), **attention)
        self.value = Linear(C, C, ("width", "heads"), **attention)
        self.mixing = make_attention(config.attention, Bert.head_sizes(config), rngs)
        self.output = Linear(C, C, ("heads", "width"), **attention)
        self.attention_norm = LayerNorm(C, config.norm_epsilon)
        self.up = Linear(C, F, ("width", "feed_forward"), **feed_forward)
        self.down = Linear(F, C, ("feed_forward", "width"), **feed_forward)
        self.feed_forward_norm = LayerNorm(C, config.norm_epsilon)

    def project(self, x_BTC: Float[Array, "B T C"], partition: Partition, *shared: Any) -> tuple[Array, Array, Array]:
        """Return queries, keys and values."""
        found = (linear(x_BTC) for linear in (self.query, self.key, self.value))
        q, k, v = (x.reshape(*x.shape[:2], self.config.heads, -1) for x in found)
        return q, k, v

    def join(self, y_BTHE: Float[Array, "B T H E"]) -> Float[Array, "B T C"]:
        """Return what the attention adds."""
        return self.output(y_BTHE.reshape(*y_BTHE.shape[:2], -1))

    def feed(self, x_BTC: Float[Array, "B T C"], dropout_key: Array | None = None) -> Float[Array, "B T C"]:
        """Return the layer's output, of its input with what the attention adds."""
        x_BTC = self.attention_norm(x_BTC)
        added_BTC = self.down(ACTIVATIONS[self.config.activation](self.up(x_BTC)))
        return self.feed_forward_norm(x_BTC + dropout(added_BTC, self.config.dropout, dropout_key))

    @property
    def sizes(self) -> HeadSizes:
        """Return the sizes of the attention's heads."""
        return Bert.head_sizes(self.config)


class MaskedHead(nnx.Module):
    """norm(activation(dense(x))), of which the embedding makes logits, and the bias of these."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        C = config.width
        self.dense = Linear(C, C, ("width", None), deviation=DEVIATION, roles=("head",), rngs=rngs)
        self.norm = LayerNorm(C, config.norm_epsilon)
        self.bias = parameter(jnp.zeros(config.vocabulary_size), ("vocabulary",), roles=("head",))
        self.activation = config.activation

    def __call__(self, x_BTC: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """Return what the embedding's matrix is multiplied with."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(x_BTC)))


def first_features(x_BTC: Float[Array, "B T C"], segment_ids_BT: Int[Array, "B T"] | None) -> Float[Array, "B C"]:
    """Return the features of the first real token of each row, which stand for all of it."""
    if segment_ids_BT is None:
        return x_BTC[:, 0]
    return x_BTC[jnp.arange(len(x_BTC)), jnp.argmax(segment_ids_BT != 0, axis=1)]


class Bert(Model):
    """Embeddings of tokens, positions and token types, a norm, layers, and heads.

    Source: the model of transformers; its weights are read and written by `lin_jax.convert.bert`.
    """

    settings = BertConfig
    cut_sizes: ClassVar[dict[str, tuple[str, ...]]] = {"heads": ("heads",), "feed_forward": ("feed_forward_size",)}
    conversion = "lin_jax.convert.bert:CONVERSION"
    can_classify = has_token_types = predicts_masked = True
    classifier = ("pooler", "score")
    leaves = ("masked_head", "logits", "next_sentence")

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        V, C = config.vocabulary_size, config.width
        self.config = config
        table: dict[str, Any] = {"decay": True, "roles": ("embedding",)}

        def embedding(rows: int, axis: str | None) -> nnx.Param:
            return parameter(DEVIATION * jax.random.normal(rngs.params(), (rows, C)), (axis, "width"), **table)

        self.embedding = embedding(V, "vocabulary")
        self.position_embedding = embedding(config.positions, "positions")
        self.token_type_embedding = embedding(config.token_types, None)
        self.embedding_norm = LayerNorm(C, config.norm_epsilon)
        self.layers = stack_layers(lambda rngs: BertLayer(config, rngs=rngs), config.depth, rngs)
        head: dict[str, Any] = {"deviation": DEVIATION, "roles": ("head",), "rngs": rngs}
        if config.pooler:
            self.pooler = Linear(C, C, ("width", None), **head)
        if config.masked_head:
            self.masked_head = MaskedHead(config, rngs=rngs)
            if not config.tie_embeddings:
                self.logits = Linear(C, V, ("width", "vocabulary"), bias=False, **head)
        if config.next_sentence:
            self.next_sentence = Linear(C, 2, ("width", None), **head)
        if config.labels:
            self.score = Linear(C, config.labels, ("width", None), **head)

    def features(
        self,
        tokens_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"] | None = None,
        partition: Partition = WHOLE,
        *,
        token_types_BT: Int[Array, "B T"] | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T C"]:
        """Return the features of all tokens, in the compute type.

        Args:
            tokens_BT: token ids.
            segment_ids_BT: every run of equal ids is a sequence of its own, 0 is padding, whose features are any
                numbers; None: a row is a sequence.
            partition: how rows, heads and vocabulary are cut over devices.
            token_types_BT: 0 for the first text of a pair, 1 for the second; None: all are 0.
            dropout_key: of what is dropped; None: nothing is.

        Raises:
            ConfigError: T exceeds the positions that the model knows.
        """
        config, (B, T) = self.config, tokens_BT.shape
        require(config.positions >= T, f"rows of {T} tokens are longer than the model's positions={config.positions}")
        rows = place(segment_ids_BT, (B, T), partition, heads="heads")
        x_BTC = self.embed(tokens_BT, rows.position_BT, token_types_BT, partition)
        kinds = config.attention.kinds(config.depth)
        of_embedding, of_layers = split_key(dropout_key, 2)
        x_BTC = dropout(x_BTC, config.dropout, of_embedding)
        options: dict[str, Any] = {"remat": config.remat, "kinds": kinds, "partition": partition}
        return run_layers(self.layers, x_BTC, rows, dropout_key=of_layers, **options)

    def embed(
        self,
        tokens_BT: Int[Array, "B T"],
        position_BT: Int[Array, "B T"],
        token_types_BT: Int[Array, "B T"] | None = None,
        partition: Partition = WHOLE,
    ) -> Float[Array, "B T C"]:
        """Return what the first layer reads."""
        types_BT = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
        x_BTC = look_up(self.embedding[...], tokens_BT, partition).astype(jnp.float32)
        x_BTC = x_BTC + self.position_embedding[...][position_BT] + self.token_type_embedding[...][types_BT]
        return self.embedding_norm(x_BTC).astype(self.config.dtype)

    def head(self, x_BTC: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        """Return the logits of masked tokens, float32; needs `masked_head` in the config."""
        x_BTC = self.masked_head(x_BTC)
        tied = self.config.tie_embeddings
        logits = x_BTC @ self.embedding[...].astype(x_BTC.dtype).T if tied else self.logits(x_BTC)
        return logits.astype(jnp.float32) + self.masked_head.bias[...].reshape((1,) * (x_BTC.ndim - 1) + (-1,))

    def classify(
        self,
        tokens_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"] | None = None,
        partition: Partition = WHOLE,
        *,
        token_types_BT: Int[Array, "B T"] | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B labels"]:
        """Return logits of the classes of each row, read from its first real token; needs `labels` in the config."""
        of_features, of_head = split_key(dropout_key, 2)
        options = {"token_types_BT": token_types_BT, "dropout_key": of_features}
        x_BTC = self.features(tokens_BT, segment_ids_BT, partition, **options)
        pooled_BC = jnp.tanh(self.pooler(first_features(x_BTC, segment_ids_BT)))
        return self.score(dropout(pooled_BC, self.config.dropout, of_head)).astype(jnp.float32)

    def __call__(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T X"]:
        """Return the logits of masked tokens, or the features of a model without a head for these."""
        x_BTC = self.features(tokens_BT, segment_ids_BT)
        return self.head(x_BTC) if self.config.masked_head else x_BTC.astype(jnp.float32)

    @classmethod
    def head_sizes(cls, config: BertConfig) -> HeadSizes:
        """Return the sizes of the heads."""
        return HeadSizes(config.heads, config.heads, config.head_size, config.head_size)

    @classmethod
    def matrices(cls, config: BertConfig) -> list[Matrix]:
        """Return the matrices of all layers, in the order in which they are used."""
        C, F = config.width, config.feed_forward_size
        shapes = {name: (C, C) for name in ("query", "key", "value", "output")} | {"up": (C, F), "down": (F, C)}
        return [Matrix(("layers", name, "kernel"), *shape, config.depth) for name, shape in shapes.items()]

    @classmethod
    def head_path(cls, config: BertConfig) -> Path:
        """Return the path of the matrix that makes the logits."""
        return ("embedding",) if config.tie_embeddings else ("logits", "kernel")
