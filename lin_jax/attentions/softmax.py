"""Softmax attention over whole rows, with a cache where it decodes."""

import dataclasses
from typing import Any, ClassVar, Literal

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
from lin_jax.settings.base import ConfigError, require, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(AttentionConfig):
    """Softmax attention over the whole row."""

    kind: Literal["softmax"] = setting("softmax", "softmax attention over the whole row")


class SoftmaxAttention(Attention):
    """y_t = sum over s <= t of softmax(q_t . k_s / sqrt(D)) v_s; a scale and a bias may be given. No parameters."""

    settings = SoftmaxConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {"softmax": {}}
    whole_scores = True

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
        require(memory is None, "attention to the tokens of another sequence is not built yet")
        if scoring is None and self.config.causal:
            return softmax_attention(q_BTHD, k_BSKD, v_BSKE, rows.segment_ids_BT, shards=rows.shards)
        scoring = scoring or Scoring(q_BTHD.shape[-1] ** -0.5)
        causal = self.config.causal
        return attend_whole_rows(q_BTHD, k_BSKD, v_BSKE, rows, activation="softmax", scoring=scoring, causal=causal)

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
        _refuse_scoring(scoring)
        longer = append_to_cache(state, Pending(k_BTKD, None, v_BTKE), count_B)
        return extend_softmax(q_BTHD, longer, state.length_B), longer

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
        _refuse_scoring(scoring)
        return verify_softmax(q_BMHD, k_BMKD, v_BMKE, tree, state), Pending(k_BMKD, None, v_BMKE)

    def commit(self, state: Cache, pending: Pending, path_BM: Int[Array, "B M"], count_B: Int[Array, " B"]) -> Cache:
        """Return the cache after the first `count_B` nodes of each row's path."""
        return commit_to_cache(state, pending, path_BM, count_B)

    @classmethod
    def flops(cls, config: SoftmaxConfig, sizes: HeadSizes, tokens: int, *, tiled: bool = False) -> int:
        """Return the operations of scores and values, see `Attention`."""
        whole = 2 * tokens * sizes.heads * (sizes.head_size + sizes.value_size)
        return whole // 2 if tiled else whole


def _refuse_scoring(scoring: Scoring | None) -> None:
    if scoring is not None:
        raise ConfigError("softmax attention with a scale or a bias of the model's own cannot be decoded yet")
