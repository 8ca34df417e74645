"""Floating point operations of a model, counted from its config."""

from lin_jax.config import FlashConfig


def training_flops_per_token(config: FlashConfig, sequence_length: int) -> float:
    """Operations of matrix products for one token, forward and backward (twice the forward), nothing recomputed.

    A multiplication and an addition are two operations. Masked halves of triangular products count, as they are
    computed; embedding look-ups and element-wise work do not.
    """
    C, E, D, T = config.width, config.value_size, config.query_key_size, sequence_length
    projections = 2 * C * 2 * E + 2 * C * D + 2 * E * C
    attention = config.attention
    if attention.kind != "augmented":
        mixing = 2 * T * (D + E)
    else:
        S = min(attention.group_size * attention.local_groups, T)
        P = config.query_key_size if attention.feature_map not in ("favor", "fourier") else attention.feature_size
        weights = attention.local != "none" or attention.convolution > 0
        mixing = 2 * S * (D * (attention.local != "none") + E * weights) + 4 * P * E * attention.grouped
    return 3.0 * (config.depth * (projections + mixing) + 2 * C * config.vocabulary_size)
