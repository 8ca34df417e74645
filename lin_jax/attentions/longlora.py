"""LongLoRA's attention: softmax inside groups, shifted by half a group for half of the heads (Chen et al., 2023)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from jaxtyping import Array, Float

from lin_jax.attentions.base import Attention, HeadSizes, LinearizedConfig, Scoring
from lin_jax.layers.rows import Rows
from lin_jax.ops.softmax_attention.api import longlora_attention
from lin_jax.settings.base import require, require_positive, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongloraConfig(LinearizedConfig):
    """LongLoRA's shifted groups; for training, not for decoding."""

    kind: Literal["longlora"] = setting(
        "longlora", "softmax attention inside groups, which half of the heads see shifted by half a group"
    )
    split: int = setting(4, "groups in a row", most=2**20)
    shift: Literal["causal", "released"] = setting(
        "causal",
        "causal: the first half group of shifted heads sees only itself; released: the official code, in which it "
        "wraps around to the end of the row and sees the future",
    )

    former: ClassVar[Mapping[str, str | None]] = {
        **LinearizedConfig.former,
        "longlora_split": "split",
        "longlora_shift": "shift",
    }

    def _check(self) -> None:
        super()._check()
        require_positive(self, "split")


class LongloraAttention(Attention):
    """See `longlora_attention`. No parameters."""

    settings = LongloraConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {"longlora": {}}

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
        require(memory is None, "attention.kind=longlora has no form for the tokens of another sequence")
        require(scoring is None, "attention.kind=longlora has no scale or bias of its own: use augmented or softmax")
        config = self.config
        return longlora_attention(
            q_BTHD, k_BSKD, v_BSKE, split=config.split, shift=config.shift, segment_ids_BT=rows.segment_ids_BT
        )

    @classmethod
    def undecodable(cls, config: LongloraConfig) -> str | None:
        """Return why it cannot be decoded, see `Attention`."""
        return (
            "attention.kind=longlora has groups that depend on a row's length, and cannot be decoded: "
            "convert the model with --attention softmax"
        )

    @classmethod
    def flops(cls, config: LongloraConfig, sizes: HeadSizes, tokens: int, *, tiled: bool = False) -> int:
        """Return the operations of scores and values in a group, see `Attention`."""
        return 2 * -(-tokens // config.split) * sizes.heads * (sizes.head_size + sizes.value_size)
