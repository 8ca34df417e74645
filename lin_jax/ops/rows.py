"""Ops along tokens whose rows may be split over devices: positions, the token before, the convolution."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.ops.causal_conv import causal_conv
from lin_jax.ops.collectives import halo, sum_before
from lin_jax.ops.layout import token_layout
from lin_jax.ops.shards import Shards


def positions(segment_ids_BT: Int[Array, "B T"], shards: Shards | None) -> Int[Array, "B T"]:
    """Return the position of each token in its run of equal ids, see `token_layout`."""
    if shards is None or shards.parts == 1:
        return token_layout(segment_ids_BT, jnp.zeros(segment_ids_BT.shape[0], jnp.int32)).position_BT
    axes, parts = shards.tokens, shards.parts

    def of_part(ids_BT: Array) -> Array:
        """Tokens before the part are told like states: how many of the run that reaches its end."""
        T = ids_BT.shape[1]
        index_T = jnp.arange(T, dtype=jnp.int32)
        before_B1 = halo(ids_BT, 1, axes, parts)
        change_BT = ids_BT != jnp.concatenate([before_B1, ids_BT[:, :-1]], axis=1)
        start_BT = jax.lax.cummax(jnp.where(change_BT, index_T[None], -1), axis=1)
        starts_B = start_BT[:, -1] >= 0
        before_B = sum_before(starts_B, jnp.where(starts_B, T - start_BT[:, -1], T), axes, parts)
        return index_T[None] + jnp.where(start_BT >= 0, -start_BT, before_B[:, None])

    return shards.run(of_part, {"ids_BT": segment_ids_BT}, {"ids_BT": "BT"}, "BT", segment_ids_BT.shape)


def delayed(x_BTC: Float[Array, "B T C"], shards: Shards | None) -> Float[Array, "B T C"]:
    """Return each token's channels from the token before it; 0 for a row's first."""
    if shards is None or shards.parts == 1:
        return _behind(jnp.zeros_like(x_BTC[:, :1]), x_BTC)

    def of_part(x_BTC: Array) -> Array:
        return _behind(halo(x_BTC, 1, shards.tokens, shards.parts), x_BTC)

    return shards.run(of_part, {"x_BTC": x_BTC}, {"x_BTC": "BTC"}, "BTC", x_BTC.shape)


def _behind(first_BC: Array, x_BTC: Array) -> Array:
    """Return `first` and all tokens but the last."""
    return jnp.concatenate([first_BC, x_BTC[:, :-1]], axis=1)


def convolve(
    x_BTHE: Float[Array, "B T H E"],
    filter_WH: Float[Array, "W #H"],
    segment_ids_BT: Int[Array, "B T"] | None,
    shards: Shards | None,
    *,
    ahead: int = 0,
) -> Float[Array, "B T H E"]:
    """Return `causal_conv` of rows that may be split where it is causal."""
    if shards is None:
        return causal_conv(x_BTHE, filter_WH, segment_ids_BT, ahead=ahead)
    reach = filter_WH.shape[0] - 1

    def longer(x_BT: Array) -> Array:
        return jnp.concatenate([halo(x_BT, reach, shards.tokens, shards.parts), x_BT], axis=1)

    def of_part(x_BTHE: Array, filter_WH: Array, ids_BT: Array | None) -> Array:
        if shards.parts == 1:
            return causal_conv(x_BTHE, filter_WH, ids_BT, ahead=ahead)
        return causal_conv(longer(x_BTHE), filter_WH, None if ids_BT is None else longer(ids_BT))[:, reach:]

    arrays = {"x_BTHE": x_BTHE, "filter_WH": filter_WH, "ids_BT": segment_ids_BT}
    axes = {"x_BTHE": "BTHE", "filter_WH": "WH", "ids_BT": "BT"}
    return shards.run(of_part, arrays, axes, "BTHE", x_BTHE.shape)
