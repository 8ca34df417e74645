"""Softmax attention over whole rows, with a cache where it decodes."""

# Letters beyond the legend: A = tokens that may be seen, in arguments of the op.

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.attentions.base import Attention, AttentionConfig, HeadSizes, Scoring
from lin_jax.attentions.whole_row import attend_whole_rows
from lin_jax.layers.rows import Rows
from lin_jax.ops.linear_attention.state import Pending
from lin_jax.ops.softmax_attention.api import softmax_attention
from lin_jax.ops.softmax_attention.cache import (
    Cache,
    append_to_cache,
    commit_to_cache,
    empty_cache,
    extend_softmax,
    verify_softmax,
)
from lin_jax.ops.tree import Tree
from lin_jax.settings.base import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(AttentionConfig):
    """Softmax attention over the whole row."""

    kind: Literal["softmax"] = setting("softmax", "softmax attention over the whole row")


class SoftmaxAttention(Attention):
    """y_t = sum over s <= t of softmax(q_t . k_s / sqrt(D)) v_s; a scale and a bias may be given. No parameters."""

    settings = SoftmaxConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {"softmax": {}}
    whole_scores = bidirectional = takes_bias = takes_memory = True

    def __call__(
        self,
        q_BTHD: Float[Array, "B T H D"],
        k_BSKD: Float[Array, "B S K D"],
        v_BSKE: Float[Array, "B S K E"],
        rows: Rows,
        memory: Rows | None = None,
        scoring: Scoring | None = None,
    ) -> Float[Array, "B T H E"]:
        """Attend in whole rows, see `Attention`; a bias is not for the tokens of another sequence."""
        causal, T, own = self.config.causal, q_BTHD.shape[1], scoring or Scoring(q_BTHD.shape[-1] ** -0.5)
        split = rows.shards is not None and rows.shards.parts > 1
        # The library's function takes no values of another size than the keys, and none for a part of a row.
        if own.bias_XH is not None and (split or q_BTHD.shape[-1] != v_BSKE.shape[-1]):
            return attend_whole_rows(q_BTHD, k_BSKD, v_BSKE, rows, activation="softmax", scoring=own, causal=causal)
        return softmax_attention(
            q_BTHD,
            k_BSKD,
            v_BSKE,
            rows.segment_ids_BT,
            memory_ids_BA=None if memory is None else _segments(memory),
            bias_XH=None if memory is not None else own.bias_at(0 if causal else 1 - T, T, causal=causal),
            causal=causal and memory is None,
            score_scale=None if scoring is None else scoring.scale,
            shards=rows.shards,
        )

    def memory_state(
        self, k_BSKD: Float[Array, "B S K D"], v_BSKE: Float[Array, "B S K E"], memory: Rows
    ) -> "SoftmaxMemory":
        """Return keys, values, and which of them are real."""
        return SoftmaxMemory(k_BSKD, v_BSKE, (_segments(memory) != 0).astype(jnp.int32))

    def attend_memory(
        self, q_BTHD: Float[Array, "B T H D"], state: "SoftmaxMemory", scoring: Scoring | None = None
    ) -> Float[Array, "B T H E"]:
        """Attend from any tokens to all real ones of another sequence."""
        return softmax_attention(
            q_BTHD,
            state.key_BSKD,
            state.value_BSKE,
            memory_ids_BA=state.real_BS,
            causal=False,
            score_scale=None if scoring is None else scoring.scale,
        )

    def empty_state(self, sizes: HeadSizes, batch: int, dtype: Any, capacity: int) -> Cache:
        """Return a cache with `capacity` slots."""
        keys = jnp.zeros((batch, 0, sizes.key_value_heads, sizes.head_size), dtype)
        return empty_cache(keys, jnp.zeros((*keys.shape[:3], sizes.value_size), dtype), capacity)

    def extend(
        self,
        q_BTHD: Float[Array, "B T H D"],
        k_BTKD: Float[Array, "B T K D"],
        v_BTKE: Float[Array, "B T K E"],
        state: Cache,
        count_B: Int[Array, " B"],
        scoring: Scoring | None = None,
    ) -> tuple[Float[Array, "B T H E"], Cache]:
        """Attend from tokens that follow the cache, see `Attention`."""
        longer = append_to_cache(state, Pending(k_BTKD, None, v_BTKE), count_B)
        return extend_softmax(q_BTHD, longer, state.length_B, **_for_cache(scoring)), longer

    def verify(
        self,
        q_BMHD: Float[Array, "B M H D"],
        k_BMKD: Float[Array, "B M K D"],
        v_BMKE: Float[Array, "B M K E"],
        state: Cache,
        tree: Tree,
        scoring: Scoring | None = None,
    ) -> tuple[Float[Array, "B M H E"], Pending]:
        """Attend from the nodes of a tree, see `Attention`."""
        y_BMHE = verify_softmax(q_BMHD, k_BMKD, v_BMKE, tree, state, **_for_cache(scoring))
        return y_BMHE, Pending(k_BMKD, None, v_BMKE)

    def commit(self, state: Cache, pending: Pending, path_BM: Int[Array, "B M"], count_B: Int[Array, " B"]) -> Cache:
        """Return the cache after the first `count_B` nodes of each row's path."""
        return commit_to_cache(state, pending, path_BM, count_B)

    @classmethod
    def memory_flops(cls, config: SoftmaxConfig, sizes: HeadSizes, tokens: int, memory_tokens: int) -> tuple[int, int]:
        """Return the operations of scores and values, all of them per token of a row."""
        return 2 * memory_tokens * sizes.heads * (sizes.head_size + sizes.value_size), 0

    @classmethod
    def flops(cls, config: SoftmaxConfig, sizes: HeadSizes, tokens: int, *, tiled: bool = False) -> int:
        """Return the operations of scores and values, see `Attention`."""
        whole = 2 * tokens * sizes.heads * (sizes.head_size + sizes.value_size)
        return whole // 2 if tiled else whole


class SoftmaxMemory(NamedTuple):
    """Another sequence as softmax attention sees it: all of its keys and values, and 1 where they are real, else 0."""

    key_BSKD: Float[Array, "B S K D"]
    value_BSKE: Float[Array, "B S K E"]
    real_BS: Int[Array, "B S"]


def _segments(rows: Rows) -> Int[Array, "B T"]:
    return jnp.ones_like(rows.position_BT) if rows.segment_ids_BT is None else rows.segment_ids_BT


def _for_cache(scoring: Scoring | None) -> dict[str, Any]:
    """Return the arguments of functions of the cache."""
    return {} if scoring is None else {"score_scale": scoring.scale, "bias_XH": scoring.bias_XH}
