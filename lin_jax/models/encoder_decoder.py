"""Models of two rows of tokens: an encoder reads the source, and a decoder predicts the target from it."""

import abc
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.layers.dropout import dropout, split_key
from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.layers.rows import Rows
from lin_jax.layers.stack import run_layers
from lin_jax.models.base import Decoder, DecoderState, Layer, Matrix, flops_of
from lin_jax.settings.base import ConfigError


class Memory(NamedTuple):
    """What a decoder reads of its sources.

    Attributes:
        x_BSC: features of their tokens.
        rows: how these lie; segment 0 is padding, and 1 the source.
    """

    x_BSC: Float[Array, "B S C"]
    rows: Rows


class MemoryLayer(Layer):
    """A layer of a decoder that reads a source."""

    @abc.abstractmethod
    def start(self, memory: Memory, capacity: int) -> Any:
        """Return the state before the first token, which holds what the layer needs of the sources.

        Args:
            memory: of the sources.
            capacity: tokens of the longest target; only caches take memory for them.
        """


class EncoderDecoder(Decoder):
    """A decoder that reads a source: stacked `encoder_layers` and `encoder_norm` beside what a decoder has.

    A source is a row of its own and of any length; it is not packed with others. A target begins with
    `config.start_token`, which is no part of the text.
    """

    reads_source: ClassVar[bool] = True
    encoder_layers: Any
    encoder_norm: Any

    @abc.abstractmethod
    def begin_source(self, source_BS: Int[Array, "B S"], source_ids_BS: Any, partition: Partition) -> tuple[Any, ...]:
        """Return what the first layer of the encoder reads, the `Rows`, and what else all of its layers are told."""

    @property
    @abc.abstractmethod
    def encoder_kinds(self) -> Any:
        """Return of what kind each layer of the encoder is, see `Layer.of_kind`."""

    @classmethod
    @abc.abstractmethod
    def source_matrices(cls, config: Any) -> list[Matrix]:
        """Return the matrices that the tokens of the source are multiplied with, in the order of their use."""

    @classmethod
    def pair_attention_flops(cls, config: Any, S: int, T: int) -> tuple[int, int]:
        """Return the operations of all attentions in a forward pass: per token of the target, and of the source.

        Args:
            config: the model.
            S: tokens of the source.
            T: tokens of the target.
        """
        sizes = cls.head_sizes(config)
        cross = flops_of(
            config.cross_attention, config.depth, lambda kind, settings: kind.memory_flops(settings, sizes, T, S)
        )
        encoder = flops_of(
            config.encoder_attention, config.encoder_depth, lambda kind, settings: kind.flops(settings, sizes, S)
        )
        read, made = (sum(part) for part in zip(*cross, strict=True))
        return cls.attention_flops(config, T) + read, sum(encoder) + made

    def encode(
        self,
        source_BS: Int[Array, "B S"],
        source_ids_BS: Int[Array, "B S"] | None = None,
        partition: Partition = WHOLE,
        *,
        dropout_key: Array | None = None,
    ) -> Memory:
        """Return what the decoder reads of the sources.

        Args:
            source_BS: token ids.
            source_ids_BS: 0 for padding, which may stand anywhere and changes nothing; None: there is none.
            partition: how rows, heads and vocabulary are cut over devices.
            dropout_key: of what is dropped; None: nothing is.
        """
        ids_BS = None if source_ids_BS is None else (source_ids_BS != 0).astype(jnp.int32)
        x_BSC, rows, *shared = self.begin_source(source_BS, ids_BS, partition)
        options: dict[str, Any] = {"remat": self.config.remat, "kinds": self.encoder_kinds, "partition": partition}
        of_embedding, of_layers, of_output = split_key(dropout_key, 3)
        x_BSC = self._drop(x_BSC, of_embedding)
        x_BSC = run_layers(self.encoder_layers, x_BSC, rows, *shared, dropout_key=of_layers, **options)
        return Memory(self._drop(self.encoder_norm(x_BSC), of_output), rows)

    def _drop(self, x: Array, key: Array | None) -> Array:
        return x if key is None else dropout(x, self.config.dropout, key)

    def features(
        self,
        tokens_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"] | None = None,
        partition: Partition = WHOLE,
        *,
        memory: Memory | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T C"]:
        """Return what the head reads, in the compute type.

        Args:
            tokens_BT: token ids of the targets, `start_token` first.
            segment_ids_BT: 0 for padding; None: there is none.
            partition: how rows, heads and vocabulary are cut over devices.
            memory: of the sources, from `encode`.
            dropout_key: of what is dropped; None: nothing is.

        Raises:
            ConfigError: there is no memory.
        """
        if memory is None:
            raise ConfigError(f"{self.config.architecture} reads a source: give features() the memory of encode()")
        x_BTC, *shared = self.begin(tokens_BT, segment_ids_BT, partition)
        options: dict[str, Any] = {"remat": self.config.remat, "kinds": self.layer_kinds, "partition": partition}
        of_embedding, of_layers, of_output = split_key(dropout_key, 3)
        x_BTC = self._drop(x_BTC, of_embedding)
        x_BTC = run_layers(self.layers, x_BTC, *shared, memory, dropout_key=of_layers, **options)
        return self._drop(self.norm(x_BTC), of_output)

    def __call__(  # type: ignore[override]
        self,
        source_BS: Int[Array, "B S"],
        tokens_BT: Int[Array, "B T"],
        source_ids_BS: Int[Array, "B S"] | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Return the logits of the next token after each of the targets, see `encode` and `features`."""
        memory = self.encode(source_BS, source_ids_BS)
        return self.head(self.features(tokens_BT, segment_ids_BT, memory=memory))

    def probe(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Return the logits of rows that are source and target alike."""
        return self(tokens_BT, tokens_BT)

    def start(
        self, source_BS: Int[Array, "B S"], source_ids_BS: Int[Array, "B S"] | None, capacity: int
    ) -> DecoderState:
        """Return the state of targets before their first token, `start_token`; the sources are encoded once, here.

        Args:
            source_BS: token ids.
            source_ids_BS: 0 for padding; None: there is none.
            capacity: tokens of the longest target, `start_token` included.

        Raises:
            ConfigError: the model cannot decode.
        """
        self.check_decodable(capacity)
        memory = self.encode(source_BS, source_ids_BS)
        states = tuple(layer.start(memory, capacity) for layer in self._each_layer())
        return DecoderState(self._in_decoding_type(states), jnp.zeros(source_BS.shape[0], jnp.int32))

    def empty_state(self, batch: int, capacity: int) -> DecoderState:
        """Raise `ConfigError`: there is nothing to say before there is a source, see `start`."""
        raise ConfigError(f"{self.config.architecture} reads a source: start() makes the state of its targets")


def shift_right(
    tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None, start_token: int
) -> Int[Array, "B T"]:
    """Return what a decoder reads to predict each token: the one before it, `start_token` before the first."""
    before_BT = jnp.pad(tokens_BT[:, :-1], ((0, 0), (1, 0)), constant_values=start_token)
    if segment_ids_BT is None:
        return before_BT
    follows_BT = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0))) == segment_ids_BT
    return jnp.where(follows_BT, before_BT, start_token)
