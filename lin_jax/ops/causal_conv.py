"""Causal depthwise convolution over tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.ops.layout import token_layout


def causal_conv(
    x_BTHE: Float[Array, "B T H E"],
    filter_WH: Float[Array, "W #H"],
    segment_ids_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H E"]:
    """y_t = sum over j = 0..W-1 of filter_j x_{t-j}, with x = 0 before the sequence starts.

    Tap 0 multiplies the current token: the released filters of 2 h + 1 taps, centred and masked to their first h + 1,
    are this filter reversed (`filter_WH[j]` is their tap h - j). Sums in float32.

    Args:
        x_BTHE: input, one filter a head.
        filter_WH: taps; an axis H of 1 shares one filter among all heads.
        segment_ids_BT: runs of equal ids are sequences of their own, 0 is padding and gives 0; None is one sequence.
    """
    B, T = x_BTHE.shape[:2]
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((B, T), jnp.int32)
    layout = token_layout(segment_ids_BT, jnp.zeros(B, jnp.int32))
    y_BTHE = jnp.zeros(x_BTHE.shape, jnp.float32)
    for tap in range(min(filter_WH.shape[0], T)):
        shifted_BTHE = jnp.pad(x_BTHE, ((0, 0), (tap, 0), (0, 0), (0, 0)))[:, :T].astype(jnp.float32)
        inside_BT = (layout.position_BT >= tap) & layout.real_BT
        y_BTHE += jnp.where(inside_BT[:, :, None, None], filter_WH[tap][None, None, :, None] * shifted_BTHE, 0)
    return y_BTHE.astype(x_BTHE.dtype)
