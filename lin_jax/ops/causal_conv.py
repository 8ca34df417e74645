"""Depthwise convolution over tokens, causal or centred."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.ops.layout import token_layout


def causal_conv(
    x_BTHE: Float[Array, "B T H E"],
    filter_WH: Float[Array, "W #H"],
    segment_ids_BT: Int[Array, "B T"] | None = None,
    *,
    ahead: int = 0,
) -> Float[Array, "B T H E"]:
    """Return y_t = sum over j = 0..W-1 of filter_j x_{t-j+ahead}, with x = 0 outside the sequence, summed in float32.

    With `ahead=0` it is causal, and tap 0 multiplies the current token: the released filters of 2 h + 1 taps, centred
    and masked to their first h + 1, are this filter reversed (`filter_WH[j]` is their tap h - j).

    Args:
        x_BTHE: input, one filter a head.
        filter_WH: taps; an axis H of 1 shares one filter among all heads.
        segment_ids_BT: runs of equal ids are sequences of their own, 0 is padding and gives 0; None is one sequence.
        ahead: taps of later tokens.
    """
    B, T = x_BTHE.shape[:2]
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((B, T), jnp.int32)
    layout = token_layout(segment_ids_BT, jnp.zeros(B, jnp.int32))
    y_BTHE = jnp.zeros(x_BTHE.shape, jnp.float32)
    for tap in range(filter_WH.shape[0]):
        back = tap - ahead
        if abs(back) >= T:
            continue
        # Outside the row stands a run that no token is of.
        inside_BT = (_moved(layout.run_BT, back, -1) == layout.run_BT) & layout.real_BT
        moved_BTHE = _moved(x_BTHE, back, 0).astype(jnp.float32)
        y_BTHE += jnp.where(inside_BT[:, :, None, None], filter_WH[tap][None, None, :, None] * moved_BTHE, 0)
    return y_BTHE.astype(x_BTHE.dtype)


def _moved(x_BT: Array, back: int, outside: int) -> Array:
    """Return x of the token `back` places earlier, or later where that is negative."""
    T, rest = x_BT.shape[1], ((0, 0),) * (x_BT.ndim - 2)
    padded = jnp.pad(x_BT, ((0, 0), (max(back, 0), max(-back, 0)), *rest), constant_values=outside)
    return padded[:, max(-back, 0) :][:, :T]
