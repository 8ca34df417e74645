"""What every kind of attention is: one interface to train and to decode, and what others need to know of a kind.

A kind is a file: its settings, its module, its operations, its names in other people's checkpoints, and what it cannot
do. A line in `lin_jax.attentions.registry` makes it known.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.layers.rows import Rows
from lin_jax.ops.tree import Tree
from lin_jax.settings.base import ConfigError, require, setting
from lin_jax.settings.typed import Settings

NOT_CAUSAL = "attention.causal=false predicts no next token, so that nothing can be generated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(Settings):
    """What all kinds of attention have. `kind` names the entry of the registry."""

    kind: str
    causal: bool = setting(True, "whether a token sees only itself and earlier ones")

    # Settings that were saved when all kinds had the same fields hold those of the other kinds too.
    former: ClassVar[Mapping[str, str | None]] = dict.fromkeys(
        (
            *("local", "grouped", "feature_map", "feature_size", "convolution", "castling", "group_size"),
            *("local_groups", "implementation", "softmax_layers", "grouped_weight", "local_weight"),
            *("normalise_grouped", "longlora_split", "longlora_shift"),
        )
    )

    def kinds(self, depth: int) -> Sequence[str]:
        """Return the kind of each of `depth` layers."""
        return [self.kind] * depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearizedConfig(AttentionConfig):
    """What kinds that take the place of softmax attention have: some layers may keep it."""

    softmax_layers: tuple[int, ...] = setting((), "layers, counted from 0, that keep softmax attention (not FLASH)")

    def _check(self) -> None:
        repeated = len(set(self.softmax_layers)) < len(self.softmax_layers)
        require(
            not repeated and all(layer >= 0 for layer in self.softmax_layers),
            f"softmax_layers must be different layers from 0 on, but is {self.softmax_layers}",
        )

    def kinds(self, depth: int) -> Sequence[str]:
        """Return the kind of each of `depth` layers."""
        return ["softmax" if layer in self.softmax_layers else self.kind for layer in range(depth)]


class HeadSizes(NamedTuple):
    """Sizes of an attention: query heads H, key/value heads K, and the sizes D and E of a head."""

    heads: int
    key_value_heads: int
    head_size: int
    value_size: int


class Scoring(NamedTuple):
    """How a model scores keys where it does not leave it to the kind.

    Attributes:
        scale: factor of q . k.
        bias_XH: added to the score, by distance t - s: row d is distance d, or distance d - X // 2 where attention is
            bidirectional. Larger distances have the bias of the last row, and smaller ones that of the first.
    """

    scale: float
    bias_XH: Float[Array, "X #H"] | None = None

    def bias_at(self, first: int, stop: int, *, causal: bool) -> Float[Array, "X2 #H"] | None:
        """Return the bias of the distances from `first` to `stop` - 1; None where there is none."""
        if self.bias_XH is None:
            return None
        rows = self.bias_XH.shape[0]
        at = np.arange(first, stop) + (0 if causal else rows // 2)
        return self.bias_XH[np.clip(at, 0, rows - 1)]


class OfficialName(NamedTuple):
    """A parameter of an attention in somebody else's checkpoint.

    Attributes:
        ours: its name in the module.
        theirs: its name behind that of the attention layer.
        form: how its numbers lie there: as ours, as one number of shape [1], as a centred filter of which the causal
            taps act, or as one of which all do.
    """

    ours: str
    theirs: str
    form: Literal["same", "scalar", "centred_filter", "full_filter"] = "same"


class Attention(nnx.Module):
    """Attention without its projections: queries, keys and values to outputs.

    A kind that decodes has all of `empty_state`, `extend`, `verify` and `commit`; another says why not in
    `undecodable`. What a state and what pending tokens are, the kind alone knows.

    Attributes:
        settings: the class of its settings.
        presets: names of whole sections of settings, for the command line, with what they set.
        whole_scores: whether it makes the scores of a whole row, which is what takes memory.
        bidirectional: whether it has a form in which tokens see later ones.
        takes_bias: whether it adds the bias of `Scoring` to its scores.
        takes_memory: whether it has a form for the tokens of another sequence.
    """

    settings: ClassVar[type[AttentionConfig]]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    whole_scores: ClassVar[bool] = False
    bidirectional: ClassVar[bool] = False
    takes_bias: ClassVar[bool] = False
    takes_memory: ClassVar[bool] = False
    config: Any

    def __init__(self, config: AttentionConfig, sizes: HeadSizes, *, rngs: nnx.Rngs, of_memory: bool = False):
        """Make the attention.

        Args:
            config: settings of the kind.
            sizes: of the heads.
            rngs: random numbers of new parameters.
            of_memory: whether keys and values are always those of another sequence.
        """
        self.config = config

    def __call__(
        self,
        q_BTHD: Float[Array, "B T H D"],
        k_BSKD: Float[Array, "B S K D"],
        v_BSKE: Float[Array, "B S K E"],
        rows: Rows,
        memory: Rows | None = None,
        scoring: Scoring | None = None,
    ) -> Float[Array, "B T H E"]:
        """Attend in whole rows.

        Args:
            q_BTHD: queries. H is a multiple of K; query head h uses key/value head h // (H / K).
            k_BSKD: keys, of the same tokens (S is T) or of the memory.
            v_BSKE: values.
            rows: how the queries' tokens lie.
            memory: how the tokens of keys and values lie, where they are those of another sequence. A query sees those
                with its own segment id, or all real ones where `rows` has no segments.
            scoring: scale and bias of the scores; None leaves them to the kind.

        Raises:
            ConfigError: a kind that cannot do this.
        """
        raise NotImplementedError

    def memory_state(self, k_BSKD: Float[Array, "B S K D"], v_BSKE: Float[Array, "B S K E"], memory: Rows) -> Any:
        """Return what queries need to know of another sequence, one in each row, made once for a whole generation.

        Args:
            k_BSKD: keys of its tokens.
            v_BSKE: values.
            memory: how they lie; segment 0 is padding, and all others are one sequence.
        """
        raise ConfigError(f"attention.kind={self.config.kind} has no form for the tokens of another sequence")

    def attend_memory(
        self, q_BTHD: Float[Array, "B T H D"], state: Any, scoring: Scoring | None = None
    ) -> Float[Array, "B T H E"]:
        """Attend from any tokens to another sequence, of which `state` is `memory_state`."""
        raise ConfigError(f"attention.kind={self.config.kind} has no form for the tokens of another sequence")

    def empty_state(self, sizes: HeadSizes, batch: int, dtype: Any, capacity: int) -> Any:
        """Return the state before the first token of `batch` rows.

        Args:
            sizes: of the heads.
            batch: rows B.
            dtype: of keys and values.
            capacity: tokens of the longest sequence; only caches take memory for them.
        """
        raise ConfigError(f"attention.kind={self.config.kind} cannot be decoded")

    def extend(
        self,
        q_BTHD: Float[Array, "B T H D"],
        k_BTKD: Float[Array, "B T K D"],
        v_BTKE: Float[Array, "B T K E"],
        state: Any,
        count_B: Int[Array, " B"],
        scoring: Scoring | None = None,
    ) -> tuple[Float[Array, "B T H E"], Any]:
        """Attend from tokens that follow a state; return the outputs and the state after each row's first `count_B`."""
        raise ConfigError(f"attention.kind={self.config.kind} cannot be decoded")

    def verify(
        self,
        q_BMHD: Float[Array, "B M H D"],
        k_BMKD: Float[Array, "B M K D"],
        v_BMKE: Float[Array, "B M K E"],
        state: Any,
        tree: Tree,
        scoring: Scoring | None = None,
    ) -> tuple[Float[Array, "B M H E"], Any]:
        """Attend from the nodes of a tree that follows a state; return the outputs and what `commit` needs of them."""
        raise ConfigError(f"attention.kind={self.config.kind} cannot be decoded")

    def commit(self, state: Any, pending: Any, path_BM: Int[Array, "B M"], count_B: Int[Array, " B"]) -> Any:
        """Return the state after the first `count_B` nodes of each row's path, of what `verify` gave."""
        raise ConfigError(f"attention.kind={self.config.kind} cannot be decoded")

    @classmethod
    def undecodable(cls, config: Any) -> str | None:
        """Return why models with these settings cannot be decoded, and what to do; None if they can."""
        return None if config.causal else NOT_CAUSAL

    @classmethod
    def refusal(cls, config: Any, architecture: str) -> str | None:
        """Return which of these settings a model of separate projections does not have, and what to do; else None.

        Args:
            config: settings of the kind.
            architecture: name of the model.
        """
        return None

    @classmethod
    def flops(cls, config: Any, sizes: HeadSizes, tokens: int, *, tiled: bool = False) -> int:
        """Return the operations of matrix products in a forward pass, per token of a row, without projections.

        Args:
            config: settings of the kind.
            sizes: of the heads.
            tokens: T, in a row.
            tiled: whether masked tiles of the scores of whole rows are left out.
        """
        raise NotImplementedError

    @classmethod
    def memory_flops(cls, config: Any, sizes: HeadSizes, tokens: int, memory_tokens: int) -> tuple[int, int]:
        """Return the operations of attention to another sequence: per token of a row, and per token of the memory.

        Args:
            config: settings of the kind.
            sizes: of the heads.
            tokens: T, in a row.
            memory_tokens: S, in the memory.
        """
        raise NotImplementedError

    @classmethod
    def recomputed_flops(cls, config: Any, sizes: HeadSizes, tokens: int) -> int:
        """Return those operations that the backward pass repeats even where layers keep everything."""
        return 0

    @classmethod
    def official_names(cls, config: Any, family: str, *, of_memory: bool = False) -> Sequence[OfficialName]:
        """Return how the official linearized models of a family (llama, gpt2, t5) call its parameters.

        Args:
            config: settings of the kind.
            family: of models; one that the official code does not have is named as one is most often.
            of_memory: whether keys and values are those of another sequence.
        """
        return ()

    @classmethod
    def check_parts(cls, config: Any, tokens: int, told: str) -> None:
        """Raise `ConfigError` unless rows can be cut over devices into parts of so many tokens.

        Args:
            config: settings of the kind.
            tokens: in a part.
            told: how the message begins: what cuts which rows into how many parts.
        """
