"""Settings of LLaMA."""

import dataclasses
from typing import Literal

from lin_jax.attentions.settings import AttentionConfig, check_transformer_attention, paper_attention
from lin_jax.layers.rope import RopeConfig
from lin_jax.settings.base import DTYPE_DOC, REMAT_DOC, require, require_positive, section, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A LLaMA 1, 2 or 3, with its softmax attention or a linearized one; the defaults are LLaMA-2-7B's."""

    architecture: Literal["llama"] = setting("llama", "which model these settings are of")
    vocabulary_size: int = setting(32000, "tokens V that the model knows")
    width: int = setting(4096, "model width C")
    depth: int = setting(32, "layers L")
    heads: int = setting(32, "query heads H")
    key_value_heads: int = setting(32, "key/value heads K, a divisor of heads")
    head_size: int = setting(128, "query/key and value size D of a head")
    feed_forward_size: int = setting(11008, "feed-forward width F")
    positions: int = setting(4096, "tokens in the longest sequence of pretraining; only rope.scaling=dynamic reads it")
    norm_epsilon: float = setting(1e-5, "added to the mean square in norms")
    rope: RopeConfig = section(RopeConfig, "rotary positions")
    attention_bias: bool = setting(False, "biases in the attention's four projections")
    feed_forward_bias: bool = setting(False, "biases in the feed-forward layer's projections")
    tie_embeddings: bool = setting(False, "the head shares the embedding's matrix")
    attention: AttentionConfig = section(paper_attention, "the attention of every layer")
    dtype: Literal["float32", "bfloat16"] = setting("float32", DTYPE_DOC)
    remat: Literal["none", "full", "dots"] = setting("none", REMAT_DOC)

    def __post_init__(self):
        require_positive(self, "vocabulary_size", "width", "depth", "heads", "key_value_heads", "head_size")
        require_positive(self, "feed_forward_size", "positions", "norm_epsilon")
        require(
            self.heads % self.key_value_heads == 0,
            f"heads={self.heads} is not divisible by key_value_heads={self.key_value_heads}",
        )
        require(self.head_size % 2 == 0, f"head_size must be even (rotated pairs), but is {self.head_size}")
        check_transformer_attention(self.attention, self.depth)
