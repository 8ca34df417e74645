"""Ops along tokens whose rows may be cut over devices: positions, the token before, the convolution."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.ops.causal_conv import causal_conv
from lin_jax.ops.collectives import halo, sum_before
from lin_jax.ops.cut import Cut
from lin_jax.ops.layout import token_layout


def positions(segment_ids_BT: Int[Array, "B T"], cut: Cut | None) -> Int[Array, "B T"]:
    """Position of each token in its run of equal ids, see `token_layout`."""
    if cut is None or cut.shards == 1:
        return token_layout(segment_ids_BT, jnp.zeros(segment_ids_BT.shape[0], jnp.int32)).position_BT
    axes, shards = cut.tokens, cut.shards

    def of_part(ids_BT: Array) -> Array:
        """Tokens before the part are told like states: how many of the run that reaches its end."""
        T = ids_BT.shape[1]
        index_T = jnp.arange(T, dtype=jnp.int32)
        before_B1 = halo(ids_BT, 1, axes, shards)
        change_BT = ids_BT != jnp.concatenate([before_B1, ids_BT[:, :-1]], axis=1)
        start_BT = jax.lax.cummax(jnp.where(change_BT, index_T[None], -1), axis=1)
        starts_B = start_BT[:, -1] >= 0
        before_B = sum_before(starts_B, jnp.where(starts_B, T - start_BT[:, -1], T), axes, shards)
        return index_T[None] + jnp.where(start_BT >= 0, -start_BT, before_B[:, None])

    return cut.run(of_part, {"ids_BT": segment_ids_BT}, "BT", segment_ids_BT.shape)


def delayed(x_BTC: Float[Array, "B T C"], cut: Cut | None) -> Float[Array, "B T C"]:
    """Each token's channels from the token before it; 0 for a row's first."""
    before = lambda x, first: jnp.concatenate([first, x[:, :-1]], axis=1)  # noqa: E731
    if cut is None or cut.shards == 1:
        return before(x_BTC, jnp.zeros_like(x_BTC[:, :1]))
    of_part = lambda x_BTC: before(x_BTC, halo(x_BTC, 1, cut.tokens, cut.shards))  # noqa: E731
    return cut.run(of_part, {"x_BTC": x_BTC}, "BTC", x_BTC.shape)


def convolve(
    x_BTHE: Float[Array, "B T H E"],
    filter_WH: Float[Array, "W #H"],
    segment_ids_BT: Int[Array, "B T"] | None,
    cut: Cut | None,
) -> Float[Array, "B T H E"]:
    """`causal_conv` of rows that may be cut."""
    if cut is None:
        return causal_conv(x_BTHE, filter_WH, segment_ids_BT)
    axes, shards, reach = cut.tokens, cut.shards, filter_WH.shape[0] - 1

    def of_part(x_BTHE: Array, filter_WH: Array, ids_BT: Array | None) -> Array:
        if shards == 1:
            return causal_conv(x_BTHE, filter_WH, ids_BT)
        longer = lambda x: jnp.concatenate([halo(x, reach, axes, shards), x], axis=1)  # noqa: E731
        return causal_conv(longer(x_BTHE), filter_WH, None if ids_BT is None else longer(ids_BT))[:, reach:]

    arrays = {"x_BTHE": x_BTHE, "filter_WH": filter_WH, "ids_BT": segment_ids_BT}
    return cut.run(of_part, arrays, "BTHE", x_BTHE.shape)
