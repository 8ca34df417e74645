"""The linear attention of the released T5 (You et al., 2024), as it was trained; new models have better kinds.

It reproduces checkpoints of the released code: values are normalised, the position bias is an attention weight, and the
convolution of the encoder reads padding. It reads whole rows and cannot be decoded.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lin_jax.attentions.base import Attention, AttentionConfig, HeadSizes, OfficialName, Scoring
from lin_jax.layers.parameter import parameter
from lin_jax.layers.rows import Rows
from lin_jax.ops.linear_attention.feature_maps import unit
from lin_jax.ops.product import product
from lin_jax.ops.rows import convolve
from lin_jax.ops.toeplitz import toeplitz
from lin_jax.settings.base import ConfigError, require, require_at_least_zero, require_positive, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleasedT5Config(AttentionConfig):
    """The linear attention of the released T5 (T5 only)."""

    kind: Literal["released_t5"] = setting("released_t5", "the released T5's linear attention, for its checkpoints")
    branches: Literal["local", "grouped", "both"] = setting("both", "local inside groups, grouped linear, or both")
    weighted: bool = setting(True, "a learned weight of the grouped branch beside the local one, which starts at 0")
    convolution: int = setting(
        0, "taps W of the convolution of the values; bidirectional it has 2 W - 1; none to the source; 0: none"
    )
    group_size: int = setting(64, "tokens G in a group", most=2**20)

    def _check(self) -> None:
        require_positive(self, "group_size")
        require_at_least_zero(self, "convolution")

    @property
    def learns_weight(self) -> bool:
        """Return whether there is a weight to learn."""
        return self.weighted and self.branches == "both"


class ReleasedT5Attention(Attention):
    """y = o / (1e-4 + ||o||) + conv(v), with o of all heads side by side, and of normalised q, k and v.

        o_t = sum over s in the group of t of (relu(q_t . k_s)^2 + bias_{t-s}) v_s + alpha q_t . sum over s of k_s v_s^T

    The second sum is over earlier groups where attention is causal, and else over all tokens. To another sequence,
    groups are paired by their number. Source: experiments/modeling_t5.py of the released code. Rows hold one sequence
    each, with padding behind it.
    """

    settings = ReleasedT5Config
    bidirectional = takes_bias = takes_memory = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {"released_t5": {}}

    def __init__(self, config: ReleasedT5Config, sizes: HeadSizes, *, rngs: Any, of_memory: bool = False):
        self.config = config
        if config.learns_weight:
            self.alpha = parameter(jnp.zeros(()), (), roles=("new", "attention"))
        if config.convolution and not of_memory:
            taps = config.convolution if config.causal else 2 * config.convolution - 1
            self.filter = parameter(jnp.zeros((taps, sizes.heads)), (None, "heads"), roles=("new", "attention"))

    def __call__(
        self,
        q_BTHD: Float[Array, "B T H D"],
        k_BSKD: Float[Array, "B S K D"],
        v_BSKE: Float[Array, "B S K E"],
        rows: Rows,
        memory: Rows | None = None,
        scoring: Scoring | None = None,
    ) -> Float[Array, "B T H E"]:
        """Attend in whole rows, see `Attention`; the score's scale is always 1."""
        config, G = self.config, self.config.group_size
        N, groups = (-(-x.shape[1] // G) for x in (q_BTHD, k_BSKD))
        require(
            groups == N or config.branches == "grouped",
            f"kind=released_t5 pairs groups, but there are {N} of the target and {groups} of the source: pad both to "
            "one length, or use kind=augmented",
        )
        # In the released code decoders hide no padding from themselves: it stands behind all that is real.
        seen = memory if memory is not None else None if config.causal else rows
        real_BS = None if seen is None or seen.segment_ids_BT is None else seen.segment_ids_BT != 0
        k = k_BSKD if real_BS is None else jnp.where(real_BS[..., None, None], k_BSKD, 0)
        q, k, v = (_groups(unit(x), G) for x in (q_BTHD, k, v_BSKE))
        y = jnp.zeros((*q.shape[:4], v.shape[-1]), jnp.float32)
        if config.branches != "grouped":
            y += self._local(q, k, v, real_BS, scoring if memory is None else None)
        if config.branches != "local":
            y += (self.alpha[...] if config.learns_weight else 1.0) * self._grouped(q, k, v)
        y_BTHE = y.reshape(y.shape[0], N * G, *y.shape[3:])[:, : q_BTHD.shape[1]]
        y_BTHE = _divided_by_norm(y_BTHE).astype(v_BSKE.dtype)
        if memory is not None or not config.convolution:
            return y_BTHE
        ahead = 0 if config.causal else config.convolution - 1
        return y_BTHE + convolve(v_BSKE, self.filter[...], None, rows.shards, ahead=ahead)

    def _local(
        self, q: Array, k: Array, v: Array, real_BS: Array | None, scoring: Scoring | None
    ) -> Float[Array, "B N G H E"]:
        G = self.config.group_size
        weight_BNHGG = jnp.square(jax.nn.relu(product("bnghd,bnahd->bnhga", q, k)))
        causal = self.config.causal
        bias_XH = None if scoring is None else scoring.bias_at(0 if causal else 1 - G, G, causal=causal)
        if bias_XH is not None:
            bias_HGG = toeplitz(bias_XH.astype(jnp.float32), 0 if causal else G - 1, G, G, 0)
            weight_BNHGG += self._masked_bias(bias_HGG, real_BS)
        if causal:
            weight_BNHGG = jnp.where(jnp.tri(G, dtype=bool), weight_BNHGG, 0)
        return product("bnhga,bnahe->bnghe", weight_BNHGG.astype(v.dtype), v)

    def _masked_bias(self, bias_HGG: Array, real_BS: Array | None) -> Float[Array, "#B #N H G G"]:
        """Return the bias, 0 to padding."""
        if real_BS is None:
            return bias_HGG[None, None]
        G = self.config.group_size
        real_BNG = jnp.pad(real_BS, ((0, 0), (0, -real_BS.shape[1] % G))).reshape(real_BS.shape[0], -1, G)
        return jnp.where(real_BNG[:, :, None, None], bias_HGG[None, None], 0)

    def _grouped(self, q: Array, k: Array, v: Array) -> Float[Array, "B N G H E"]:
        if not self.config.causal:
            return product("bnghd,bhde->bnghe", q, product("bnghd,bnghe->bhde", k, v).astype(q.dtype))
        state_BNHDE = product("bnghd,bnghe->bnhde", k, v)
        before_BNHDE = jnp.cumsum(state_BNHDE, axis=1) - state_BNHDE
        return product("bnghd,bnhde->bnghe", q, before_BNHDE.astype(q.dtype))

    @classmethod
    def undecodable(cls, config: ReleasedT5Config) -> str | None:
        """Return why it cannot be decoded, see `Attention`."""
        return "kind=released_t5 reads whole rows and cannot be decoded; train kind=augmented"

    @classmethod
    def refusal(cls, config: ReleasedT5Config, architecture: str) -> str | None:
        """Return why only T5 has it."""
        return None if architecture == "t5" else "kind=released_t5 is T5's; use augmented, softmax or longlora"

    @classmethod
    def flops(cls, config: ReleasedT5Config, sizes: HeadSizes, tokens: int, *, tiled: bool = False) -> int:
        """Return the operations of scores, values and states, see `Attention`."""
        read, written = cls.memory_flops(config, sizes, tokens, tokens)
        return read + written

    @classmethod
    def memory_flops(
        cls, config: ReleasedT5Config, sizes: HeadSizes, tokens: int, memory_tokens: int
    ) -> tuple[int, int]:
        """Return the operations of the group's scores and values and of the state's reading, and of its making."""
        H, _, D, E = sizes
        state = 0 if config.branches == "local" else 2 * H * D * E
        local = 0 if config.branches == "grouped" else 2 * min(config.group_size, memory_tokens) * H * (D + E)
        return local + state, state

    @classmethod
    def official_names(
        cls, config: ReleasedT5Config, family: str, *, of_memory: bool = False
    ) -> Sequence[OfficialName]:
        """Return its names in the released T5."""
        form: Literal["centred_filter", "full_filter"] = "centred_filter" if config.causal else "full_filter"
        alpha, taps = OfficialName("alpha", "alpha", "scalar"), OfficialName("filter", "dwconv.weight", form)
        return [alpha] * config.learns_weight + [taps] * (config.convolution > 0 and not of_memory)

    @classmethod
    def check_parts(cls, config: ReleasedT5Config, tokens: int, told: str) -> None:
        """Raise `ConfigError`: rows cannot be cut over devices."""
        raise ConfigError(f"{told}, but kind=released_t5 reads whole rows: use mesh.sequence=1")


def _groups(x_BTHD: Float[Array, "B T H D"], G: int) -> Float[Array, "B N G H D"]:
    B, T, H, D = x_BTHD.shape
    return jnp.pad(x_BTHD, ((0, 0), (0, -T % G), (0, 0), (0, 0))).reshape(B, -1, G, H, D)


def _divided_by_norm(y_BTHE: Float[Array, "B T H E"]) -> Float[Array, "B T H E"]:
    """Return o / (1e-4 + ||o||) of all heads side by side, with a finite gradient at 0."""
    square_BT11 = jnp.sum(jnp.square(y_BTHE), axis=(2, 3), keepdims=True)
    return y_BTHE / (1e-4 + jnp.sqrt(jnp.maximum(square_BT11, 1e-24)))
