"""FLASH's quadratic attention: the local activation over the whole row (Hua et al., 2022)."""

import dataclasses
from typing import Any, ClassVar, Literal

from jaxtyping import Array, Float

from lin_jax.attentions.base import Attention, AttentionConfig, HeadSizes, Scoring
from lin_jax.attentions.whole_row import attend_whole_rows
from lin_jax.layers.rows import Rows
from lin_jax.settings.base import require, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuadraticConfig(AttentionConfig):
    """The local activation over the whole row (FLASH only)."""

    kind: Literal["quadratic"] = setting("quadratic", "the local activation over the whole row (FLASH only)")
    local: Literal["relu2", "laplace"] = setting("relu2", "activation of the scores")


class QuadraticAttention(Attention):
    """y_t = sum over s <= t of a(scale q_t . k_s + bias_{t-s}) v_s. No parameters."""

    settings = QuadraticConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {"quadratic": {}}
    whole_scores = bidirectional = takes_bias = True

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
        require(memory is None, "attention.kind=quadratic has no form for the tokens of another sequence")
        config, scoring = self.config, scoring or Scoring(1.0)
        options: dict[str, Any] = {"activation": config.local, "scoring": scoring, "causal": config.causal}
        return attend_whole_rows(q_BTHD, k_BSKD, v_BSKE, rows, **options)

    @classmethod
    def undecodable(cls, config: QuadraticConfig) -> str | None:
        """Return why it cannot be decoded, see `Attention`."""
        return "kind=quadratic reads whole rows and cannot be decoded; train kind=augmented"

    @classmethod
    def refusal(cls, config: QuadraticConfig, architecture: str) -> str | None:
        """Return why only FLASH has it."""
        return "attention.kind=quadratic is FLASH's; use augmented, softmax or longlora"

    @classmethod
    def flops(cls, config: QuadraticConfig, sizes: HeadSizes, tokens: int, *, tiled: bool = False) -> int:
        """Return the operations of scores and values, see `Attention`."""
        return 2 * tokens * sizes.heads * (sizes.head_size + sizes.value_size)
