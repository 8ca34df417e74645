"""Settings of FLASH."""

import dataclasses
from typing import Literal

from lin_jax.attentions.settings import AttentionConfig, refuse_transformer_attention
from lin_jax.settings.base import (
    DTYPE_DOC,
    REMAT_DOC,
    require,
    require_at_least_zero,
    require_positive,
    section,
    setting,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashConfig:
    """A FLASH language model: gated attention units, no separate feed-forward layers."""

    architecture: Literal["flash"] = setting("flash", "which model these settings are of")
    vocabulary_size: int = setting(50257, "tokens V that the model knows")
    width: int = setting(768, "model width C")
    depth: int = setting(24, "layers L")
    query_key_size: int = setting(128, "query/key size D, shared by all layers' single head")
    expansion: float = setting(2.0, "value size E as a multiple of the width")
    norm: Literal["scalenorm", "layernorm"] = setting("scalenorm", "normalisation before each layer")
    token_shift: bool = setting(True, "delay half of the channels by one token before each layer")
    rotary_size: int = setting(32, "channels of queries and keys that are rotated by position")
    bias_buckets: int = setting(32, "buckets of the T5 relative position bias")
    bias_max_distance: int = setting(128, "distance from which on all positions share the last bucket")
    attention: AttentionConfig = section(AttentionConfig, "the attention of every layer")
    padding: Literal["exact", "released"] = setting(
        "exact",
        "exact: padding changes nothing; released: the official code, in which the convolution and the token shift "
        "see padding and groups are counted from the start of the row",
    )
    score_scale: Literal["released", "head"] = setting(
        "released",
        "scale of whole-row scores (kinds softmax and quadratic): released divides by the row length, as the official "
        "code does; head divides by the square root of query_key_size, which does not depend on the row",
    )
    dtype: Literal["float32", "bfloat16"] = setting("float32", DTYPE_DOC)
    remat: Literal["none", "full", "dots"] = setting("none", REMAT_DOC)

    def __post_init__(self):
        require_positive(self, "vocabulary_size", "width", "depth", "query_key_size", "expansion", "bias_max_distance")
        require_at_least_zero(self, "rotary_size")
        require(self.width % 2 == 0, f"width must be even (sine and cosine halves), but is {self.width}")
        require(
            self.rotary_size % 2 == 0 and self.rotary_size <= self.query_key_size,
            f"rotary_size must be even and at most query_key_size={self.query_key_size}, but is {self.rotary_size}",
        )
        require(
            self.bias_buckets >= 4 and self.bias_buckets % 4 == 0,
            f"bias_buckets must be a positive multiple of 4, but is {self.bias_buckets}",
        )
        require(
            self.bias_max_distance > self.bias_buckets // 2,
            f"bias_max_distance must exceed bias_buckets/2={self.bias_buckets // 2}, but is {self.bias_max_distance}",
        )
        value_size = self.width * self.expansion
        require(value_size == int(value_size), f"width * expansion must be whole, but is {value_size}")
        refuse_transformer_attention(self.attention)

    @property
    def value_size(self) -> int:
        """Value size E."""
        return int(self.width * self.expansion)
