"""Floating point operations of a model, counted from its config."""

from collections.abc import Callable
from typing import Any

from lin_jax.config import AttentionConfig, FlashConfig, Gpt2Config, LlamaConfig, ModelConfig
from lin_jax.layers.attention import layer_kinds


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Operations of matrix products for one token, forward and backward (twice the forward), nothing recomputed.

    A multiplication and an addition are two operations. Masked halves of triangular products count, as they are
    computed; embedding look-ups and element-wise work do not.
    """
    layers = _LAYERS[type(config)](config, sequence_length)
    return 3.0 * (layers + 2 * config.width * config.vocabulary_size)


def _flash_layers(config: FlashConfig, T: int) -> int:
    """Forward operations of all layers for one token."""
    C, E, D = config.width, config.value_size, config.query_key_size
    projections = 2 * C * 2 * E + 2 * C * D + 2 * E * C
    return config.depth * (projections + _attention_flops(config, T))


def _llama_layers(config: LlamaConfig, T: int) -> int:
    C, H, K, D = config.width, config.heads, config.key_value_heads, config.head_size
    matrices = 2 * C * (2 * H + 2 * K) * D + 3 * 2 * C * config.feed_forward_size
    kinds = layer_kinds(config.attention, config.depth)
    return config.depth * matrices + sum(_mixing_flops(config.attention, kind, H, K, D, T) for kind in kinds)


def _gpt2_layers(config: Gpt2Config, T: int) -> int:
    C, H, D = config.width, config.heads, config.head_size
    matrices = 2 * C * 4 * C + 2 * 2 * C * config.feed_forward_size
    kinds = layer_kinds(config.attention, config.depth)
    return config.depth * matrices + sum(_mixing_flops(config.attention, kind, H, H, D, T) for kind in kinds)


_LAYERS: dict[type, Callable[[Any, int], int]] = {
    FlashConfig: _flash_layers,
    LlamaConfig: _llama_layers,
    Gpt2Config: _gpt2_layers,
}


def _mixing_flops(attention: AttentionConfig, kind: str, H: int, K: int, D: int, T: int) -> int:
    """Forward operations of one layer's `Mixing` for one token: scores and values, and the grouped branch's state."""
    if kind == "softmax":
        return 4 * T * H * D
    if kind == "longlora":
        return 4 * -(-T // attention.longlora_split) * H * D
    S = min(attention.local_groups * attention.group_size, T)
    scores = 2 * S * H * D if attention.local != "none" else 0
    values = 2 * S * H * D if attention.local != "none" or attention.convolution else 0
    return scores + values + (2 * (H + K) * D * D if attention.grouped else 0)


def _attention_flops(config: FlashConfig, T: int) -> int:
    """Forward operations of one layer's attention for one token."""
    E, D, attention = config.value_size, config.query_key_size, config.attention
    if attention.kind != "augmented":
        return 2 * T * (D + E)
    groups = attention.local_groups if attention.causal else 2 * attention.local_groups - 1
    S = min(groups * attention.group_size, T)
    scores = 2 * S * D if attention.local != "none" else 0
    # The convolution shares the product of the scores with the values, unless castling comes in between.
    weighted = attention.local != "none" or (attention.convolution > 0 and not attention.castling)
    values = 2 * S * E if weighted else 0
    return scores + values + (_grouped_flops(config) if attention.grouped else 0)


def _grouped_flops(config: FlashConfig) -> int:
    """Random features of query and key, the key's part in the state, and the query's product with it."""
    E, D, P = config.value_size, config.query_key_size, config.attention.feature_size
    rows = {"favor": P, "fourier": P // 2}.get(config.attention.feature_map, 0)
    return 4 * D * rows + 4 * (P if rows else D) * E
