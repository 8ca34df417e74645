"""What models are: their settings, what others ask of them, and the verbs of those that decode."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attentions.base import Attention, AttentionConfig, HeadSizes, Scoring
from lin_jax.attentions.registry import ATTENTIONS, attention_of_kind
from lin_jax.layers.dropout import dropout
from lin_jax.layers.parameter import Path
from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.layers.rows import Rows
from lin_jax.layers.stack import each_layer, run_layers, unstack_layers
from lin_jax.ops.target import decoding_type
from lin_jax.ops.tree import Tree
from lin_jax.settings.base import DTYPE_DOC, REMAT_DOC, require, require_at_least_zero, setting
from lin_jax.settings.typed import Settings

LABELS_DOC = "classes of a classification head, 1 for a number; 0: the model has none"
LABEL_NAMES_DOC = "names of the classes, in their order; empty: they are numbers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """What the settings of all models have. `architecture` names the entry of the registry.

    Attributes:
        free: settings that may differ from those of the model that a run starts from, as they don't say what its
            parameters are.
        attention_fields: names of the settings that are attentions; a model with several stacks has several.
        row_limit: tokens of the longest row that the model can read; None: any number.
    """

    architecture: str
    vocabulary_size: int = setting(32000, "tokens V that the model knows", most=2**24)
    width: int = setting(512, "model width C", most=2**20)
    depth: int = setting(8, "layers L", most=2**12)
    attention: AttentionConfig
    dtype: Literal["float32", "bfloat16"] = setting("float32", DTYPE_DOC)
    remat: Literal["none", "full", "dots"] = setting("none", REMAT_DOC)

    free: ClassVar[tuple[str, ...]] = ("attention", "dtype", "remat")
    attention_fields: ClassVar[tuple[str, ...]] = ("attention",)

    @property
    def row_limit(self) -> int | None:
        """Return the tokens of the longest row; None where there is no limit."""
        return None

    def with_classes(self, labels: int, label_names: tuple[str, ...]) -> Any:
        """Return the settings with a head of these classes, for models that can classify."""
        config: Any = self
        return dataclasses.replace(config, labels=labels, label_names=label_names)

    def check_segments(self) -> None:
        """Raise `ConfigError` where the model cannot keep the documents of a row apart."""


def check_labels(config: Any) -> None:
    """Raise `ConfigError` unless `labels` and `label_names` of a model's settings agree."""
    require_at_least_zero(config, "labels")
    names = config.label_names
    require(
        not names or len(set(names)) == len(names) == config.labels,
        f"label_names must be labels={config.labels} different names, but is {names}",
    )


class Matrix(NamedTuple):
    """A parameter that features are multiplied with: its path in the model, its shape, in how many layers it is."""

    path: Path
    inputs: int
    outputs: int
    layers: int = 1

    @property
    def flops(self) -> int:
        """Operations per token."""
        return 2 * self.inputs * self.outputs * self.layers


class Model(nnx.Module):
    """A model, and what sharding, plans, conversion and finetuning ask of its kind.

    Attributes:
        settings: the class of its settings.
        cut_sizes: settings that a mesh must divide, by the logical axis that they are the size of.
        conversion: `module:attribute` of what knows its names in Hugging Face's form, or the thing itself; None: it
            has none.
        has_softmax_form: whether its layers are made of `attend` and `feed`, so that softmax attention can stand in
            any of them: what attention transfer needs.
        can_classify: whether it has `classify`, where its settings say `labels`.
        classifier: the first parts of the paths of what `classify` needs and a model that was trained to do something
            else may lack: the head, and what stands before it.
        leaves: the first parts of the paths of heads that a run may leave behind in the model that it starts from.
        predicts_masked: whether it has a head for masked tokens, where its settings say `masked_head`.
        has_token_types: whether it tells the texts of a pair apart by `token_types_BT`.
        plain_scores: whether scores have no bias, so that kernels of softmax attention can make them a tile at a time.
        medusa: Medusa heads where `lin_jax.load` found some beside the model.
        reads_source: whether it reads a source, another row of tokens, beside those that it predicts; see
            `lin_jax.models.encoder_decoder.EncoderDecoder`.
    """

    settings: ClassVar[type[ModelConfig]]
    cut_sizes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    conversion: ClassVar[Any] = None
    has_softmax_form: ClassVar[bool] = False
    can_classify: ClassVar[bool] = False
    classifier: ClassVar[tuple[str, ...]] = ()
    leaves: ClassVar[tuple[str, ...]] = ()
    predicts_masked: ClassVar[bool] = False
    has_token_types: ClassVar[bool] = False
    plain_scores: ClassVar[bool] = True
    reads_source: ClassVar[bool] = False
    config: Any
    medusa: Any = None

    def probe(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T X"]:
        """Return numbers by which two models of the kind are compared: what they give for rows of tokens."""
        return self(tokens_BT)

    @classmethod
    def head_sizes(cls, config: Any) -> HeadSizes:
        """Return the sizes of the heads of every attention."""
        raise NotImplementedError

    @classmethod
    def matrices(cls, config: Any) -> list[Matrix]:
        """Return the matrices of all layers, in the order in which they are used."""
        raise NotImplementedError

    @classmethod
    def head_path(cls, config: Any) -> Path:
        """Return the path of the matrix that makes the logits."""
        return ("logits", "kernel")

    @classmethod
    def attention_flops(cls, config: Any, tokens: int, *, tiled: bool = False) -> int:
        """Return the operations of all layers' attentions in a forward pass, per token; see `Attention.flops`."""
        return sum(_flops_by_layer(cls, config, tokens, tiled and cls.plain_scores))

    @classmethod
    def recomputed_flops(cls, config: Any, tokens: int) -> int:
        """Return those that the backward pass repeats anyway, see `Attention.recomputed_flops`."""
        sizes, attention = cls.head_sizes(config), config.attention
        own = ATTENTIONS[attention.kind].recomputed_flops(attention, sizes, tokens)
        return own * attention.kinds(config.depth).count(attention.kind)


def flops_of(attention: AttentionConfig, depth: int, count: Callable[[type[Attention], Any], Any]) -> list[Any]:
    """Return what `count` gives for the kind and settings of each of `depth` layers that have this attention."""
    whole = {}
    for kind in attention.kinds(depth):
        settings = (
            attention if kind == attention.kind else ATTENTIONS[kind].settings(kind=kind, causal=attention.causal)
        )
        whole[kind] = count(ATTENTIONS[kind], settings)
    return [whole[kind] for kind in attention.kinds(depth)]


def _flops_by_layer(model: type[Model], config: Any, tokens: int, tiled: bool) -> list[int]:
    sizes = model.head_sizes(config)
    return flops_of(
        config.attention, config.depth, lambda kind, settings: kind.flops(settings, sizes, tokens, tiled=tiled)
    )


class Layer(nnx.Module):
    """A layer of a decoder: what it makes of features and of its own state."""

    def of_kind(self, kind: Any) -> Any:
        """Return the layer with the attention that layers of a kind have, see `AttentionConfig.kinds`."""
        return self

    @abc.abstractmethod
    def __call__(self, x_BTC: Float[Array, "B T C"], rows: Rows, *shared: Any) -> Float[Array, "B T C"]:
        """Apply the layer to whole rows; `shared` is what the model tells all layers."""

    @abc.abstractmethod
    def empty_state(self, batch: int, capacity: int) -> Any:
        """Return the state before the first token."""

    @abc.abstractmethod
    def extend(
        self, x_BTC: Float[Array, "B T C"], state: Any, count_B: Int[Array, " B"], *shared: Any
    ) -> tuple[Float[Array, "B T C"], Any]:
        """Apply the layer to tokens that follow a state; return the state after each row's first `count_B` too."""

    @abc.abstractmethod
    def verify(
        self, x_BMC: Float[Array, "B M C"], state: Any, tree: Tree, *shared: Any
    ) -> tuple[Float[Array, "B M C"], Any]:
        """Apply the layer to the nodes of a tree that follows a state; return what `commit` needs of them too."""

    @abc.abstractmethod
    def commit(self, state: Any, pending: Any, path_BM: Int[Array, "B M"], count_B: Int[Array, " B"]) -> Any:
        """Return the state after the first `count_B` nodes of each row's path."""

    def take(self, state: Any, row_B: Int[Array, " B"]) -> Any:
        """Return a state whose rows are these rows of another, all of which have read the same source, if any."""
        return jax.tree.map(lambda x: x[row_B], state)


class ResidualLayer(Layer):
    """x + attention, then the feed-forward layer, for any kind of attention.

    A model says how features become queries, keys and values (`project`), how outputs become what is added (`join`),
    and what else the layer does (`feed`); also how keys are scored, where the kind of attention does not (`scoring`).
    """

    config: Any

    @abc.abstractmethod
    def project(self, x_BTC: Float[Array, "B T C"], partition: Partition, *shared: Any) -> tuple[Array, Array, Array]:
        """Return queries [B, T, H, D], keys [B, T, K, D] and values [B, T, K, E]."""

    @abc.abstractmethod
    def join(self, y_BTHE: Float[Array, "B T H E"]) -> Float[Array, "B T C"]:
        """Return what the attention adds, of the heads' outputs."""

    @abc.abstractmethod
    def feed(self, x_BTC: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """Return x with what the feed-forward layer adds; of models with dropout also given a `dropout_key`."""

    def scoring(self, *shared: Any) -> Scoring | None:
        """Return how keys are scored; None leaves it to the kind of attention."""
        return None

    def holder(self) -> Any:
        """Return the module whose `mixing` is the attention."""
        return self

    def of_kind(self, kind: Any) -> Any:
        """Return the layer with its own attention, or with the softmax attention that layers of this kind keep."""
        mixing = attention_of_kind(self.holder().mixing, kind)
        if mixing is self.holder().mixing:
            return self
        other = nnx.merge(*nnx.split(self))
        other.holder().mixing = mixing
        return other

    def __call__(
        self, x_BTC: Float[Array, "B T C"], rows: Rows, *shared: Any, dropout_key: Array | None = None
    ) -> Float[Array, "B T C"]:
        """Apply the layer to whole rows; only layers of models with dropout are called with a key of it."""
        added_BTC = self.attend(x_BTC, rows, *shared)
        if dropout_key is None:
            return self.feed(x_BTC + added_BTC)
        of_attention, of_feed = jax.random.split(dropout_key)
        added_BTC = dropout(added_BTC, self.config.dropout, of_attention)
        return self.feed(x_BTC + added_BTC, dropout_key=of_feed)  # type: ignore[call-arg]

    def attend(self, x_BTC: Float[Array, "B T C"], rows: Rows, *shared: Any) -> Float[Array, "B T C"]:
        """Return what the attention adds."""
        q_BTHD, k_BTKD, v_BTKE = self.project(x_BTC, rows.partition, *shared)
        return self.join(self._attention(q_BTHD, k_BTKD, v_BTKE, rows, **self._told(*shared)))

    def empty_state(self, batch: int, capacity: int) -> Any:
        """Return the state before the first token, see `Attention.empty_state`."""
        return self._attention.empty_state(self.sizes, batch, self.config.dtype, capacity)

    def extend(
        self, x_BTC: Float[Array, "B T C"], state: Any, count_B: Int[Array, " B"], *shared: Any
    ) -> tuple[Float[Array, "B T C"], Any]:
        """Apply the layer to tokens that follow a state."""
        operands = self.project(x_BTC, WHOLE, *shared)
        y_BTHE, after = self._attention.extend(*operands, state, count_B, **self._told(*shared))
        return self.feed(x_BTC + self.join(y_BTHE)), after

    def verify(
        self, x_BMC: Float[Array, "B M C"], state: Any, tree: Tree, *shared: Any
    ) -> tuple[Float[Array, "B M C"], Any]:
        """Apply the layer to the nodes of a tree that follows a state."""
        operands = self.project(x_BMC, WHOLE, *shared)
        y_BMHE, pending = self._attention.verify(*operands, state, tree, **self._told(*shared))
        return self.feed(x_BMC + self.join(y_BMHE)), pending

    def commit(self, state: Any, pending: Any, path_BM: Int[Array, "B M"], count_B: Int[Array, " B"]) -> Any:
        """Return the state after the first `count_B` nodes of each row's path."""
        return self._attention.commit(state, pending, path_BM, count_B)

    @property
    def _attention(self) -> Attention:
        return self.holder().mixing

    def _told(self, *shared: Any) -> dict[str, Any]:
        scoring = self.scoring(*shared)
        # Kinds that are never told how to score need not know that others are.
        return {} if scoring is None else {"scoring": scoring}

    @property
    @abc.abstractmethod
    def sizes(self) -> HeadSizes:
        """Return the sizes of the attention's heads."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderState:
    """What a decoder knows of the `length_B` tokens that it has read in each row: the state of every layer."""

    layers: tuple[Any, ...]
    length_B: Int[Array, " B"]


class Decoder(Model):
    """A model of the next token: `embed`, stacked or single `layers`, `norm` and `head`.

    It decodes with the layers' states. Layers are run one after another when it decodes: their states then stay where
    they are, and are not copied in and out of a stack.
    """

    layers: Any
    norm: Any

    @abc.abstractmethod
    def begin(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None, partition: Partition = WHOLE
    ) -> tuple[Any, ...]:
        """Return what the first layer reads of whole rows, their `Rows`, and what else all layers are told."""

    @abc.abstractmethod
    def embed(self, tokens_BT: Int[Array, "B T"], position_BT: Int[Array, "B T"]) -> tuple[Array, tuple[Any, ...]]:
        """Return what the first layer reads of tokens that follow a state, in any type, and what layers are told."""

    @abc.abstractmethod
    def head(self, x_BTC: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        """Return the logits of `features`, float32."""

    @property
    def layer_kinds(self) -> Sequence[Any]:
        """Return of what kind each layer is, see `Layer.of_kind`."""
        return self.config.attention.kinds(self.config.depth)

    def check_decodable(self, capacity: int) -> None:
        """Raise `ConfigError` unless sequences of `capacity` tokens can be decoded exactly."""
        attention = self.config.attention
        reason = ATTENTIONS[attention.kind].undecodable(attention)
        require(reason is None, str(reason))

    def features(
        self,
        tokens_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"] | None = None,
        partition: Partition = WHOLE,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T C"]:
        """Return what the head reads, in the compute type.

        Args:
            tokens_BT: token ids.
            segment_ids_BT: every run of equal ids is a sequence of its own, 0 is padding; None: a row is a sequence.
            partition: how rows, heads and vocabulary are cut over devices.
            dropout_key: of what is dropped, for models that have dropout; None: nothing is.

        Raises:
            ConfigError: T exceeds the positions that the model knows.
        """
        x_BTC, *shared = self.begin(tokens_BT, segment_ids_BT, partition)
        options: dict[str, Any] = {"remat": self.config.remat, "kinds": self.layer_kinds, "partition": partition}
        if dropout_key is not None:
            of_embedding, options["dropout_key"] = jax.random.split(dropout_key)
            x_BTC = dropout(x_BTC, self.config.dropout, of_embedding)
        return self.norm(run_layers(self.layers, x_BTC, *shared, **options))

    def __call__(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Return the logits of the next token after each, see `features`."""
        return self.head(self.features(tokens_BT, segment_ids_BT))

    def empty_state(self, batch: int, capacity: int) -> DecoderState:
        """Return the state of `batch` rows before their first token.

        Args:
            batch: rows B.
            capacity: tokens of the longest sequence; only softmax attention, with its cache, takes memory for them.

        Raises:
            ConfigError: the model cannot decode, or not so many tokens.
        """
        self.check_decodable(capacity)
        states = tuple(layer.empty_state(batch, capacity) for layer in self._without_parameters())
        return DecoderState(self._in_decoding_type(states), jnp.zeros(batch, jnp.int32))

    def _in_decoding_type(self, states: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the states, of which what is in the model's type is in that of decoding."""
        narrow, wide = jnp.dtype(self.config.dtype), decoding_type(self.config.dtype)
        return jax.tree.map(lambda x: x.astype(wide) if x.dtype == narrow else x, states)

    def _without_parameters(self) -> list[Layer]:
        """The layers for what does not depend on their parameters; a whole stack serves as each of its layers."""
        kinds = self.layer_kinds
        layers = self.layers if isinstance(self.layers, nnx.List) else [self.layers] * len(kinds)
        return [layer.of_kind(kind) for layer, kind in zip(layers, kinds, strict=True)]

    def _each_layer(self) -> list[Layer]:
        kinds, layers = self.layer_kinds, each_layer(self.layers, self.config.depth)
        return [layer.of_kind(kind) for layer, kind in zip(layers, kinds, strict=True)]

    def forward(
        self, tokens_BT: Int[Array, "B T"], state: DecoderState, real_BT: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T C"], DecoderState]:
        """Read tokens that follow the state; a long text in several calls, each with a part of it.

        Args:
            tokens_BT: token ids.
            state: of the tokens before.
            real_BT: False for padding, which may stand anywhere in a row and changes nothing; None: there is none.

        Returns:
            The features of the tokens, which `head` reads (of padding: any numbers), and the state after them.
        """
        B, T = tokens_BT.shape
        if real_BT is None:
            return self._extend(tokens_BT, state, jnp.full(B, T, jnp.int32))
        count_B = jnp.sum(real_BT, axis=1, dtype=jnp.int32)
        order_BT = jnp.argsort(~real_BT, axis=1, stable=True)
        x_BTC, state = self._extend(jnp.take_along_axis(tokens_BT, order_BT, axis=1), state, count_B)
        back_BT = jnp.maximum(jnp.cumsum(real_BT, axis=1) - 1, 0)
        return jnp.take_along_axis(x_BTC, back_BT[:, :, None], axis=1), state

    def _extend(self, tokens_BT: Array, state: DecoderState, count_B: Array) -> tuple[Array, DecoderState]:
        position_BT = state.length_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        x_BTC, shared = self.embed(tokens_BT, position_BT)
        x_BTC = x_BTC.astype(decoding_type(self.config.dtype))
        states = []
        for layer, before in zip(self._each_layer(), state.layers, strict=True):
            x_BTC, after = layer.extend(x_BTC, before, count_B, *shared)
            states.append(after)
        return self.norm(x_BTC), DecoderState(tuple(states), state.length_B + count_B)

    def verify(
        self, tokens_BM: Int[Array, "B M"], tree: Tree, state: DecoderState
    ) -> tuple[Float[Array, "B M C"], tuple[Any, ...]]:
        """Look at draft tokens: the nodes of a tree whose root follows the state.

        Returns:
            The features of every node, as if its path had been read; and what `commit` needs. The state stays.
        """
        x_BMC, shared = self.embed(tokens_BM, state.length_B[:, None] + jnp.asarray(tree.depth_M)[None])
        x_BMC = x_BMC.astype(decoding_type(self.config.dtype))
        pending = []
        for layer, before in zip(self._each_layer(), state.layers, strict=True):
            x_BMC, of_layer = layer.verify(x_BMC, before, tree, *shared)
            pending.append(of_layer)
        return self.norm(x_BMC), tuple(pending)

    def commit(
        self, state: DecoderState, pending: tuple[Any, ...], path_BM: Int[Array, "B M"], count_B: Int[Array, " B"]
    ) -> DecoderState:
        """Return the state after the first `count_B` nodes of each row's path, which may be none.

        Args:
            state: that the nodes were verified with.
            pending: from `verify`.
            path_BM: nodes from the root downwards; entries from `count_B` on are not looked at.
            count_B: nodes to keep.
        """
        triples = zip(self._without_parameters(), state.layers, pending, strict=True)
        states = tuple(layer.commit(before, of_layer, path_BM, count_B) for layer, before, of_layer in triples)
        return DecoderState(states, state.length_B + count_B)

    def take(self, state: DecoderState, row_B: Int[Array, " B"]) -> DecoderState:
        """Return a state whose rows are these rows of another; a row stands for one with the same source, if any."""
        pairs = zip(self._without_parameters(), state.layers, strict=True)
        return DecoderState(tuple(layer.take(of_layer, row_B) for layer, of_layer in pairs), state.length_B[row_B])


def require_next_tokens(model: Model, *, of_sources: bool = False) -> None:
    """Raise `ConfigError` unless a model predicts the next token of its rows, or with `of_sources` also of targets."""
    architecture = model.config.architecture
    require(isinstance(model, Decoder), f"a {architecture} reads whole texts, and predicts no next token")
    require(of_sources or not model.reads_source, f"a {architecture} reads a source, and has no text of its own")


def unstacked(model: Decoder) -> Decoder:
    """Return the model with its layers apart and without Medusa heads, for decoding.

    Reading layers from a stack would copy them at every step.
    """
    if isinstance(model.layers, nnx.List):
        return model
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, state)
    copy.medusa = None
    copy.layers = unstack_layers(model.layers, model.config.depth)
    return copy


def check_cache(config: Any, capacity: int) -> None:
    """Raise `ConfigError` where softmax layers meet more tokens than the model was trained for."""
    kinds: Sequence[str] = config.attention.kinds(config.depth)
    require(
        "softmax" not in kinds or capacity <= config.positions,
        f"{capacity} tokens are more than the positions={config.positions} of a model with softmax attention: "
        "ask for fewer",
    )
