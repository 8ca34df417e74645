"""Augmented linear attention (You et al., 2024): local, grouped and convolution branches.

`Mixture` computes them from queries and keys that a model has made, with the numbers that weigh the branches; FLASH
uses it with its own. `AugmentedAttention` is the kind for models whose layers have one query and key for both branches.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attentions.base import Attention, AttentionConfig, HeadSizes, LinearizedConfig, OfficialName, Scoring
from lin_jax.layers.parameter import parameter
from lin_jax.layers.rows import Rows
from lin_jax.ops.castling import castling_sum
from lin_jax.ops.linear_attention import AttentionArrays, AttentionOptions, attend
from lin_jax.ops.linear_attention.feature_maps import FEATURE_MAPS, unit
from lin_jax.ops.linear_attention.memory import attend_memory, memory_state
from lin_jax.ops.linear_attention.state import AttentionState, Pending, empty_state
from lin_jax.ops.linear_attention.verify import append, commit_path, verify_tree
from lin_jax.ops.rows import convolve
from lin_jax.ops.tree import Tree, chain
from lin_jax.settings.base import require, require_at_least_zero, require_positive, setting

Local = Literal["relu2", "laplace", "softmax", "none"]
Implementation = Literal["xla", "reference", "pallas_tpu", "pallas_gpu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentedConfig(LinearizedConfig):
    """Augmented linear attention. The paper's ablations are points of these settings: `AugmentedAttention.presets`."""

    kind: Literal["augmented"] = setting("augmented", "local groups + grouped linear + convolution")
    local: Local = setting("relu2", "activation of the scores inside the local window; none turns the branch off")
    grouped: bool = setting(True, "linear attention to the groups before the local window")
    feature_map: str = setting(
        "identity", f"what the grouped branch does to its queries and keys: {', '.join(FEATURE_MAPS)}"
    )
    feature_size: int = setting(256, "width of the random feature maps favor and fourier; even for fourier", most=2**16)
    convolution: int = setting(
        32,
        "taps W of the causal depthwise convolution of the values; outside FLASH a bidirectional one is centred and "
        "has 2 W - 1; 0 turns it off",
        most=2**12,
    )
    castling: bool = setting(False, "Castling-ViT's normalised sum of values and attention, instead of plain attention")
    group_size: int = setting(256, "tokens G in a group", most=2**20)
    local_groups: int = setting(1, "groups R in the local window; 1 is the paper's", most=2**12)
    implementation: Implementation | None = setting(None, "which form computes it; None chooses by device and shape")
    grouped_weight: Literal["learned", "one"] = setting(
        "learned",
        "weight of the grouped branch outside FLASH: learned is one number a layer that starts at 0; one is the "
        "official benchmark's",
    )
    local_weight: Literal["one", "learned"] = setting(
        "one", "weight of the local branch outside FLASH; learned is one number a layer that starts at 1"
    )
    normalise_grouped: bool = setting(
        False, "divide each head's grouped output by its norm, as the official NORM_GLOBAL does (not FLASH)"
    )

    def _check(self) -> None:
        super()._check()
        require_positive(self, "group_size", "local_groups", "feature_size")
        require_at_least_zero(self, "convolution")
        require(
            self.feature_map in FEATURE_MAPS,
            f"feature_map must be one of {', '.join(FEATURE_MAPS)}, but is {self.feature_map}",
        )
        on = self.local != "none" or self.grouped or self.convolution > 0
        require(on, "attention has nothing to compute: turn on local, grouped or convolution")
        require(
            self.feature_map != "fourier" or self.feature_size % 2 == 0,
            f"feature_size must be even for feature_map=fourier (cosines and sines), but is {self.feature_size}",
        )

    @property
    def widens(self) -> bool:
        """Return whether the feature map has arrays of its own, and makes `feature_size` features."""
        return bool(FEATURE_MAPS[self.feature_map].arrays)

    def features(self, head_size: int) -> int:
        """Return the features P of a head of the grouped branch."""
        return FEATURE_MAPS[self.feature_map].size(head_size, self.feature_size)

    def projected(self, head_size: int) -> int:
        """Return the numbers in the feature map's own arrays."""
        maps = FEATURE_MAPS[self.feature_map].arrays
        return sum(math.prod(array.shape(head_size, self.feature_size)) for array in maps)


def paper_attention() -> AttentionConfig:
    """Return the paper's attention of LLaMA and GPT-2: groups of 64 tokens, as in the released code."""
    return AugmentedConfig(group_size=64)


class Operands(NamedTuple):
    """What the branches multiply.

    Attributes:
        q: queries [B, T, H, D].
        k: keys [B, T, K, D].
        v: values [B, T, K, E].
        grouped_q: queries [B, T, H, P] of the grouped branch where it has its own, else None.
        grouped_k: its keys [B, T, K, P].
        convolved_v: values of the convolution where it sees others, else None.
    """

    q: Array
    k: Array
    v: Array
    grouped_q: Array | None = None
    grouped_k: Array | None = None
    convolved_v: Array | None = None


class _Branches(NamedTuple):
    """Which branches of the op are on."""

    local: str = "none"
    grouped: bool = False
    alpha: Array | float = 1.0
    conv_WH: Array | None = None


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The branches of augmented attention with the numbers that weigh them.

    `empty_state` and `commit` need the settings alone.

    Attributes:
        config: the settings.
        score_scale: factor of q . k in the local branch.
        alpha: weight of the grouped branch, one number or one per query head.
        local_factor: weight of the local branch; None is 1.
        conv_WH: filter of the convolution; None where it is off.
        taps_ahead: taps of it that multiply later tokens.
        bias_XH: added to the local scores, by distance.
        normalise: whether the op divides queries and keys by their norm, so that a kernel needs no normalised copies.
    """

    config: AugmentedConfig
    score_scale: float = 1.0
    alpha: Array | float = 1.0
    local_factor: Array | None = None
    conv_WH: Array | None = None
    taps_ahead: int = 0
    bias_XH: Array | None = None
    normalise: bool = False

    def attend(self, operands: Operands, rows: Rows) -> Float[Array, "B T H E"]:
        """Attend in whole rows."""

        def of(branches: _Branches) -> Array:
            if branches.local == "none" and not branches.grouped:
                v = operands.v if operands.convolved_v is None else operands.convolved_v
                assert branches.conv_WH is not None
                v_BTHE, ahead = _per_query_head(v, operands.q), self.taps_ahead
                return convolve(v_BTHE, branches.conv_WH, rows.segment_ids_BT, rows.shards, ahead=ahead)
            return attend(
                self._arrays(operands, branches),
                self._options(branches),
                segment_ids_BT=rows.segment_ids_BT,
                shards=rows.shards,
                position_BT=rows.position_BT,
            )[0]

        return self._combine(operands, of)

    def empty_state(self, k_BTKD: Array, v_BTKE: Array, grouped_k_BTKP: Array | None) -> AttentionState:
        """Return the state before the first token, for keys and values of these shapes (T does not matter)."""
        taps = self.config.convolution
        return empty_state(k_BTKD, v_BTKE, self._options(_Branches()), grouped_k_BTKP=grouped_k_BTKP, taps=taps)

    def extend(
        self, operands: Operands, state: AttentionState, count_B: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T H E"], AttentionState]:
        """Attend from tokens that follow a state; return the state after each row's first `count_B` of them."""
        T = operands.q.shape[1]
        if self.config.group_size >= T:  # Rows shorter than a group are not padded to one.
            y_BTHE, pending = self.verify(operands, state, chain(T))
            return y_BTHE, append(state, pending, count_B, self._options(_Branches()))
        ids_BT = (jnp.arange(T)[None] < count_B[:, None]).astype(jnp.int32)

        def of(branches: _Branches) -> Array:
            arrays, options = self._arrays(operands, branches), self._options(branches)
            return attend(arrays, options, segment_ids_BT=ids_BT, initial_state=state)[0]

        y_BTHE = self._combine(operands, of)
        return y_BTHE, append(state, _pending(operands), count_B, self._options(_Branches()))

    def verify(self, operands: Operands, state: AttentionState, tree: Tree) -> tuple[Float[Array, "B M H E"], Pending]:
        """Attend from the nodes of a tree that follows a state, which stays as it is."""

        def of(branches: _Branches) -> Array:
            return verify_tree(self._arrays(operands, branches), tree, state, self._options(branches))

        return self._combine(operands, of), _pending(operands)

    def commit(
        self, state: AttentionState, pending: Pending, path_BM: Int[Array, "B M"], count_B: Int[Array, " B"]
    ) -> AttentionState:
        """Return the state after the first `count_B` nodes of each row's path."""
        return commit_path(state, pending, path_BM, count_B, self._options(_Branches()))

    def _combine(self, operands: Operands, attend: Callable[[_Branches], Array]) -> Array:
        """All branches in one product, unless something comes in between."""
        config, conv_WH = self.config, self.conv_WH
        split = config.normalise_grouped or self.local_factor is not None
        if not (split or config.castling or operands.convolved_v is not None or self.taps_ahead):
            return attend(_Branches(config.local, config.grouped, self.alpha, conv_WH))
        # Castling adds the values that the convolution sees, in the official code those of padding too.
        v_BTHE = _per_query_head(operands.v if operands.convolved_v is None else operands.convolved_v, operands.q)
        if split:
            y = self._weigh_apart(jnp.zeros_like(v_BTHE), attend)
        elif config.local != "none" or config.grouped:
            y = attend(_Branches(config.local, config.grouped, self.alpha))
        else:
            y = jnp.zeros_like(v_BTHE)
        if config.castling:
            y = castling_sum(v_BTHE, y)
        return y if conv_WH is None else y + attend(_Branches(conv_WH=conv_WH))

    def _weigh_apart(self, y: Array, attend: Callable[[_Branches], Array]) -> Array:
        """y with the local and the grouped branch, each computed by itself."""
        config = self.config
        if config.local != "none":
            local = attend(_Branches(local=config.local))
            y += local if self.local_factor is None else local * self.local_factor.astype(y.dtype)
        if config.grouped:
            grouped = attend(_Branches(grouped=True))
            grouped = _normalised(grouped) if config.normalise_grouped else grouped
            y += grouped * jnp.asarray(self.alpha).astype(y.dtype)
        return y

    def _arrays(self, operands: Operands, branches: _Branches) -> AttentionArrays:
        return AttentionArrays(
            operands.q,
            operands.k,
            operands.v,
            operands.grouped_q,
            operands.grouped_k,
            bias_XH=self.bias_XH if branches.local != "none" else None,
            alpha_H=branches.alpha,
            conv_WH=branches.conv_WH,
        )

    def _options(self, branches: _Branches) -> AttentionOptions:
        config = self.config
        return AttentionOptions(
            group_size=config.group_size,
            local_groups=config.local_groups,
            local=branches.local,
            score_scale=self.score_scale,
            grouped=branches.grouped,
            # Operands hold the features of a map that has arrays of its own.
            feature_map="identity" if config.widens else config.feature_map,
            normalise=self.normalise,
            causal=config.causal,
            implementation=config.implementation,
        )


# The rows of the paper's ablation tables.
_ABLATIONS: dict[str, dict[str, Any]] = {
    "local": {"grouped": False, "convolution": 0},
    "grouped": {"local": "none", "convolution": 0},
    "local_grouped": {"convolution": 0},
    "local_convolution": {"grouped": False},
    "augmented": {},
}


class AugmentedAttention(Attention):
    """Augmented attention of one query and key per head.

    relu2 and laplace score normalised queries and keys, as released; softmax the scaled ones as they are. The new
    parameters start so that pretrained layers are disturbed least: grouped branch and convolution at 0, as released.

    To another sequence it is the grouped branch alone, to the mean of all its real tokens, so that its size does not
    depend on their number: y_t = alpha / S sum over s of phi(q_t) . phi(k_s) v_s, with an alpha that starts at 1.
    """

    settings = AugmentedConfig
    presets = _ABLATIONS
    bidirectional = takes_bias = takes_memory = True

    def __init__(self, config: AugmentedConfig, sizes: HeadSizes, *, rngs: nnx.Rngs, of_memory: bool = False):
        self.config = config
        if of_memory:
            require(config.grouped, "attention to another sequence has the grouped branch alone: set grouped=True")
        if config.grouped and config.grouped_weight == "learned":
            self.alpha = parameter(jnp.full((), float(of_memory)), (), roles=("new", "attention"))
        if of_memory:
            return
        if config.local != "none" and config.local_weight == "learned":
            self.local_factor = parameter(jnp.ones(()), (), roles=("new", "attention"))
        if config.convolution:
            start_WH = jnp.zeros((config.convolution + self._taps_ahead, sizes.heads))
            self.filter = parameter(start_WH, (None, "heads"), roles=("new", "attention"))

    @property
    def _taps_ahead(self) -> int:
        return 0 if self.config.causal else max(self.config.convolution - 1, 0)

    def __call__(
        self,
        q_BTHD: Float[Array, "B T H D"],
        k_BSKD: Float[Array, "B S K D"],
        v_BSKE: Float[Array, "B S K E"],
        rows: Rows,
        memory: Rows | None = None,
        scoring: Scoring | None = None,
    ) -> Float[Array, "B T H E"]:
        """Attend in whole rows, see `Attention`."""
        if memory is not None:
            return self.attend_memory(q_BTHD, self.memory_state(k_BSKD, v_BSKE, memory))
        mixture = self._mixture(q_BTHD.shape[-1], scoring)
        # States hold keys that are normalised, so the op cannot do it where parts of rows pass them on.
        if rows.shards is not None and rows.shards.parts > 1:
            return mixture.attend(self._operands(q_BTHD, k_BSKD, v_BSKE), rows)
        return dataclasses.replace(mixture, normalise=True).attend(Operands(q_BTHD, k_BSKD, v_BSKE), rows)

    def memory_state(
        self, k_BSKD: Float[Array, "B S K D"], v_BSKE: Float[Array, "B S K E"], memory: Rows
    ) -> Float[Array, "B K P E"]:
        """Return the mean of phi(k) v^T over the real tokens of another sequence, float32."""
        ids_BS = memory.segment_ids_BT
        real_BS = None if ids_BS is None else ids_BS != 0
        count_B = k_BSKD.shape[1] if real_BS is None else jnp.maximum(jnp.sum(real_BS, axis=1), 1)
        sums_BKPE = memory_state(unit(k_BSKD), v_BSKE, real_BS, self.config.feature_map)
        return sums_BKPE / jnp.reshape(jnp.asarray(count_B, jnp.float32), (-1, 1, 1, 1))

    def attend_memory(
        self, q_BTHD: Float[Array, "B T H D"], state: Float[Array, "B K P E"], scoring: Scoring | None = None
    ) -> Float[Array, "B T H E"]:
        """Attend from any tokens to all real ones of another sequence."""
        y_BTHE = attend_memory(unit(q_BTHD), state, self.config.feature_map)
        return y_BTHE * jnp.asarray(self._alpha).astype(y_BTHE.dtype)

    @property
    def _alpha(self) -> Array | float:
        learned = self.config.grouped and self.config.grouped_weight == "learned"
        return self.alpha[...] if learned else 1.0

    def empty_state(self, sizes: HeadSizes, batch: int, dtype: Any, capacity: int) -> AttentionState:
        """Return the state before the first token; it needs no capacity."""
        k_BTKD = jnp.zeros((batch, 0, sizes.key_value_heads, sizes.head_size), dtype)
        v_BTKE = jnp.zeros((*k_BTKD.shape[:3], sizes.value_size), dtype)
        own_keys = self.config.local == "softmax" and self.config.grouped
        return Mixture(self.config).empty_state(k_BTKD, v_BTKE, k_BTKD if own_keys else None)

    def extend(
        self,
        q_BTHD: Float[Array, "B T H D"],
        k_BTKD: Float[Array, "B T K D"],
        v_BTKE: Float[Array, "B T K E"],
        state: AttentionState,
        count_B: Int[Array, " B"],
        scoring: Scoring | None = None,
    ) -> tuple[Float[Array, "B T H E"], AttentionState]:
        """Attend from tokens that follow a state, see `Attention`."""
        mixture = self._mixture(q_BTHD.shape[-1], scoring)
        return mixture.extend(self._operands(q_BTHD, k_BTKD, v_BTKE), state, count_B)

    def verify(
        self,
        q_BMHD: Float[Array, "B M H D"],
        k_BMKD: Float[Array, "B M K D"],
        v_BMKE: Float[Array, "B M K E"],
        state: AttentionState,
        tree: Tree,
        scoring: Scoring | None = None,
    ) -> tuple[Float[Array, "B M H E"], Pending]:
        """Attend from the nodes of a tree, see `Attention`."""
        mixture = self._mixture(q_BMHD.shape[-1], scoring)
        return mixture.verify(self._operands(q_BMHD, k_BMKD, v_BMKE), state, tree)

    def commit(
        self, state: AttentionState, pending: Pending, path_BM: Int[Array, "B M"], count_B: Int[Array, " B"]
    ) -> AttentionState:
        """Return the state after the first `count_B` nodes of each row's path."""
        return Mixture(self.config).commit(state, pending, path_BM, count_B)

    def _mixture(self, head_size: int, scoring: Scoring | None = None) -> Mixture:
        config, slots = self.config, self.config.group_size * self.config.local_groups
        scoring = scoring or Scoring(head_size**-0.5 if config.local == "softmax" else 1.0)
        weighs_local = config.local != "none" and config.local_weight == "learned"
        return Mixture(
            config,
            scoring.scale,
            alpha=self._alpha,
            local_factor=self.local_factor[...] if weighs_local else None,
            conv_WH=self.filter[...] if config.convolution else None,
            taps_ahead=self._taps_ahead,
            bias_XH=scoring.bias_at(0 if config.causal else 1 - slots, slots, causal=config.causal),
        )

    def _operands(self, q: Array, k: Array, v: Array) -> Operands:
        """Queries and keys, normalised as each branch needs them."""
        if self.config.local != "softmax":
            return Operands(unit(q), unit(k), v)
        return Operands(q, k, v, unit(q), unit(k)) if self.config.grouped else Operands(q, k, v)

    @classmethod
    def refusal(cls, config: AugmentedConfig, architecture: str) -> str | None:
        """Return what of these settings only FLASH has."""
        if not config.widens:
            return None
        return f"feature_map={config.feature_map} is FLASH's; use identity, unit, relu or elu1"

    @classmethod
    def flops(cls, config: AugmentedConfig, sizes: HeadSizes, tokens: int, *, tiled: bool = False) -> int:
        """Return the operations of scores, values, and the grouped branch's features and state, see `Attention`."""
        H, K, D, E = sizes
        groups = config.local_groups if config.causal else 2 * config.local_groups - 1
        S = min(groups * config.group_size, tokens)
        scores = 2 * S * H * D if config.local != "none" else 0
        # The convolution shares the product of the scores with the values, unless castling comes in between.
        shares = config.convolution > 0 and not config.castling and config.causal
        weighted = config.local != "none" or shares
        values = 2 * S * H * E if weighted else 0
        return scores + values + (cls._grouped_flops(config, sizes) if config.grouped else 0)

    @classmethod
    def memory_flops(
        cls, config: AugmentedConfig, sizes: HeadSizes, tokens: int, memory_tokens: int
    ) -> tuple[int, int]:
        """Return the operations of a query's product with the state, and of a token's part in it."""
        H, K, D, E = sizes
        return 2 * H * config.features(D) * E, 2 * K * config.features(D) * E

    @classmethod
    def _grouped_flops(cls, config: AugmentedConfig, sizes: HeadSizes) -> int:
        """Random features of queries and keys, a key's part in the state, and a query's product with it."""
        H, K, D, E = sizes
        return 2 * (H + K) * (config.projected(D) + config.features(D) * E)

    @classmethod
    def recomputed_flops(cls, config: AugmentedConfig, sizes: HeadSizes, tokens: int) -> int:
        """Return all of them: the weights of chunks are never kept for the backward pass."""
        return cls.flops(config, sizes, tokens)

    @classmethod
    def official_names(cls, config: AugmentedConfig, family: str, *, of_memory: bool = False) -> Sequence[OfficialName]:
        """Return the names in the official linearized LLaMA and GPT-2, and for other models those of T5."""
        has = {
            "alpha": config.grouped and config.grouped_weight == "learned",
            "local_factor": config.local != "none" and config.local_weight == "learned" and not of_memory,
            "filter": config.convolution > 0 and not of_memory,
        }
        names = [name for name in _OFFICIAL_NAMES.get(family, _OTHER_NAMES).values() if has[name.ours]]
        return names if config.causal else [_with_all_taps(name) for name in names]

    @classmethod
    def check_parts(cls, config: AugmentedConfig, tokens: int, told: str) -> None:
        """Raise `ConfigError` unless parts hold whole groups, and all that the next part needs of them."""
        group = config.group_size
        require(tokens % group == 0, f"{told}, which is no multiple of model.attention.group_size={group}")
        sent = max(config.local_groups * group, config.convolution) - 1
        require(
            tokens >= sent,
            f"{told}, fewer than the {sent} that model.attention.local_groups={config.local_groups}, "
            f"group_size={group} and convolution={config.convolution} reach back",
        )


_OFFICIAL_NAMES: Mapping[str, Mapping[str, OfficialName]] = {
    "llama": {
        "alpha": OfficialName("alpha", "global_factor", "scalar"),
        "local_factor": OfficialName("local_factor", "local_factor", "scalar"),
        "filter": OfficialName("filter", "dwconv.weight", "centred_filter"),
    },
    "gpt2": {
        "alpha": OfficialName("alpha", "alpha", "scalar"),
        "local_factor": OfficialName("local_factor", "local_factor", "scalar"),
        "filter": OfficialName("filter", "dconv_ada.weight", "centred_filter"),
    },
}
_OTHER_NAMES: Mapping[str, OfficialName] = {
    "alpha": OfficialName("alpha", "alpha", "scalar"),
    "local_factor": OfficialName("local_factor", "local_factor", "scalar"),
    "filter": OfficialName("filter", "dwconv.weight", "centred_filter"),
}


def _with_all_taps(name: OfficialName) -> OfficialName:
    return name._replace(form="full_filter") if name.form == "centred_filter" else name


def _pending(operands: Operands) -> Pending:
    return Pending(operands.k, operands.grouped_k, operands.v)


def _per_query_head(v_BTKE: Array, q_BTHD: Array) -> Float[Array, "B T H E"]:
    return jnp.repeat(v_BTKE, q_BTHD.shape[2] // v_BTKE.shape[2], axis=2)


def _normalised(x: Float[Array, "B T H E"]) -> Float[Array, "B T H E"]:
    """x / (1e-5 + ||x||), with a finite gradient at 0."""
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.maximum(square, 1e-24))
    return (x / (1e-5 + norm)).astype(x.dtype)
