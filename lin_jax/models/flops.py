"""Floating point operations of a model, counted from its config."""

from lin_jax.config import FlashConfig


def training_flops_per_token(config: FlashConfig, sequence_length: int) -> float:
    """Operations of matrix products for one token, forward and backward (twice the forward), nothing recomputed.

    A multiplication and an addition are two operations. Masked halves of triangular products count, as they are
    computed; embedding look-ups and element-wise work do not.
    """
    C, E, D = config.width, config.value_size, config.query_key_size
    projections = 2 * C * 2 * E + 2 * C * D + 2 * E * C
    mixing = _attention_flops(config, sequence_length)
    return 3.0 * (config.depth * (projections + mixing) + 2 * C * config.vocabulary_size)


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
