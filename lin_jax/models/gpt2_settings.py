"""Settings of GPT-2."""

import dataclasses
from typing import Literal

from lin_jax.attentions.settings import AttentionConfig, check_transformer_attention, paper_attention
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
class Gpt2Config:
    """A GPT-2, with its softmax attention or a linearized one; the defaults are those of the 124M model."""

    architecture: Literal["gpt2"] = setting("gpt2", "which model these settings are of")
    vocabulary_size: int = setting(50257, "tokens V that the model knows")
    width: int = setting(768, "model width C, a multiple of heads")
    depth: int = setting(12, "layers L")
    heads: int = setting(12, "heads H")
    feed_forward_size: int = setting(3072, "feed-forward width F")
    positions: int = setting(1024, "learned positions, and so tokens in the longest row")
    norm_epsilon: float = setting(1e-5, "added to the variance in norms")
    tie_embeddings: bool = setting(True, "the head shares the embedding's matrix")
    labels: int = setting(0, "classes of a sequence-classification head; 0: the model has none")
    attention: AttentionConfig = section(paper_attention, "the attention of every layer")
    dtype: Literal["float32", "bfloat16"] = setting("float32", DTYPE_DOC)
    remat: Literal["none", "full", "dots"] = setting("none", REMAT_DOC)

    def __post_init__(self):
        require_positive(self, "vocabulary_size", "width", "depth", "heads", "feed_forward_size", "positions")
        require_positive(self, "norm_epsilon")
        require_at_least_zero(self, "labels")
        require(self.width % self.heads == 0, f"width={self.width} is not divisible by heads={self.heads}")
        check_transformer_attention(self.attention, self.depth)

    @property
    def head_size(self) -> int:
        """Query/key and value size D of a head."""
        return self.width // self.heads
