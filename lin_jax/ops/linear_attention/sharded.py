"""Augmented attention over a mesh: each device has its rows, heads or values, and a stretch of the tokens.

Only what does not grow with the row crosses devices: the tokens of the open window, the last values for the
convolution, and the sum over all tokens before those, which is combined over the devices (`sum_before`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lin_jax.ops.collectives import halo, sum_before
from lin_jax.ops.cut import Cut
from lin_jax.ops.linear_attention.api import augmented_attention
from lin_jax.ops.linear_attention.feature_maps import FEATURE_MAPS
from lin_jax.ops.linear_attention.state import AttentionState, empty_state, take_tokens, window_start
from lin_jax.ops.product import product


def sharded_attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKE: Float[Array, "B T K E"],
    *,
    cut: Cut | None,
    position_BT: Int[Array, "B T"],
    grouped_q_BTHP: Float[Array, "B T H P"] | None = None,
    grouped_k_BTKP: Float[Array, "B T K P"] | None = None,
    bias_XH: Float[Array, "X #H"] | None = None,
    alpha: Float[Array, " #H"] | Float[Array, ""] | float = 1.0,
    conv_WH: Float[Array, "W #H"] | None = None,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    **options: Any,
) -> Float[Array, "B T H E"]:
    """`augmented_attention` of arrays that are cut; causal where tokens are.

    Args:
        q_BTHD: queries.
        k_BTKD: keys.
        v_BTKE: values.
        cut: along which axes of a mesh; None: they are not.
        position_BT: of each token in its sequence.
        grouped_q_BTHP: see `augmented_attention`, as the other arguments.
        grouped_k_BTKP: keys of the grouped branch.
        bias_XH: by distance.
        alpha: weight of the grouped branch.
        conv_WH: causal filter.
        segment_ids_BT: sequences of a row.
        options: what is no array.

    Raises:
        ValueError: a part of a row is shorter than what the next one needs of it.
    """
    arrays: dict[str, Any] = {
        "q_BTHD": q_BTHD,
        "k_BTKD": k_BTKD,
        "v_BTKE": v_BTKE,
        "grouped_q_BTHP": grouped_q_BTHP,
        "grouped_k_BTKP": grouped_k_BTKP,
        "bias_XH": bias_XH,
        "conv_WH": conv_WH,
        "segment_ids_BT": segment_ids_BT,
    }
    if cut is None:
        return cast(Array, augmented_attention(**arrays, alpha=alpha, **options))
    arrays["alpha_H"] = jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), q_BTHD.shape[2:3])
    if cut.shards > 1:
        arrays["position_BT"] = position_BT

    def of_part(alpha_H: Array, position_BT: Array | None = None, **part: Any) -> Array:
        before = {} if position_BT is None else _before(cut, position_BT, part, options)
        return cast(Array, augmented_attention(**part, alpha=alpha_H, **before, **options))

    return cut.run(of_part, arrays, "BTHE", (*q_BTHD.shape[:3], v_BTKE.shape[3]))


class _Tokens(NamedTuple):
    """Tokens [B, A, ...] as the state holds them."""

    key: Array
    grouped_key: Array | None
    value: Array


def _before(cut: Cut, position_BT: Array, part: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What `augmented_attention` is told of the tokens before this part of the row."""
    k, v, conv, ids = (part[name] for name in ("k_BTKD", "v_BTKE", "conv_WH", "segment_ids_BT"))
    sizes = {"group_size": options["group_size"], "local_groups": options.get("local_groups", 1)}
    T, aligned = k.shape[1], ids is None and k.shape[1] % sizes["group_size"] == 0
    # Where groups begin anywhere, all slots of the open window but one may be full.
    reach = sizes["group_size"] * sizes["local_groups"] - (sizes["group_size"] if aligned else 1)
    taps = 0 if conv is None else conv.shape[0]
    most = max(reach, taps - 1)
    if most > T:
        raise ValueError(f"parts of {T} tokens are shorter than the {most} that the next one needs")

    row = _Tokens(k, part["grouped_k_BTKP"], v)
    value = halo(v, most, cut.tokens, cut.shards)
    key, grouped_key = jax.tree.map(lambda x: halo(x, reach, cut.tokens, cut.shards), row[:2])
    window = _Tokens(key, grouped_key, _last(value, reach))
    length_B = position_BT[:, 0] if ids is None else jnp.where(ids[:, 0] != 0, position_BT[:, 0], 0)
    state = _open_window(window, value, length_B, taps, **sizes)
    if options.get("grouped", True):
        fold = jax.checkpoint(_folded, static_argnums=(4, 5))
        static = (options.get("feature_map", "identity"), *sizes.values())
        reset_B, sums = fold(row, window, position_BT, length_B, aligned, static)
        earlier = sum_before(reset_B, sums, cut.tokens, cut.shards)
        state = dataclasses.replace(state, state_BKPE=jnp.where((length_B > 0)[:, None, None, None], earlier, 0))
    return {"initial_state": state, "aligned_state": aligned}


def _open_window(
    window: _Tokens, value: Array, length_B: Array, taps: int, *, group_size: int, local_groups: int
) -> AttentionState:
    """The state after `length_B` tokens whose last ones are given, but for what is folded."""
    empty = empty_state(
        window.key,
        window.value,
        grouped_k_BTKP=window.grouped_key,
        group_size=group_size,
        local_groups=local_groups,
        taps=taps,
    )
    start_B = window_start(length_B, group_size, local_groups)
    slot_BS = start_B[:, None] + jnp.arange(group_size * local_groups, dtype=jnp.int32)[None]
    index_BS = slot_BS - (length_B - window.key.shape[1])[:, None]
    valid_BS = (slot_BS >= 0) & (slot_BS < length_B[:, None])
    key, grouped_key, value_BSKE = jax.tree.map(lambda x: take_tokens(x, index_BS, valid_BS), window)
    tail = empty.tail_BUKE.shape[1]
    known_BU = length_B[:, None] + jnp.arange(-tail, 0, dtype=jnp.int32)[None] >= 0
    return dataclasses.replace(
        empty,
        key_BSKD=key,
        grouped_key_BSKP=grouped_key,
        value_BSKE=value_BSKE,
        tail_BUKE=jnp.where(known_BU[:, :, None, None], _last(value, tail), 0),
        length_B=length_B,
    )


def _folded(
    row: _Tokens, window: _Tokens, position_BT: Array, length_B: Array, aligned: bool, sizes: tuple[str, int, int]
) -> tuple[Bool[Array, " B"], Float[Array, "B K P E"]]:
    """What this part adds to the state of the run that reaches its end: its tokens and those of the window before it.

    Tokens of the window that is open at the end of the part are not yet folded.

    Returns:
        Whether that run began in this part, and the sum of phi(k) v^T.
    """
    feature_map, group_size, local_groups = sizes
    T, reach = row.key.shape[1], window.key.shape[1]
    reset_B = position_BT[:, -1] < T
    if aligned:
        closed = jax.tree.map(lambda x: x[:, : T - reach], row)
        return reset_B, _outer_sum(window, None, feature_map) + _outer_sum(closed, None, feature_map)
    start_B, end_B = (window_start(x, group_size, local_groups) for x in (length_B, position_BT[:, -1] + 1))
    of_run_BT = jnp.arange(-T, 0, dtype=jnp.int32)[None] + position_BT[:, -1:] + 1 >= 0
    row_BT = of_run_BT & (position_BT < end_B[:, None])
    position_BU = length_B[:, None] + jnp.arange(-reach, 0, dtype=jnp.int32)[None]
    window_BU = (position_BU >= jnp.maximum(start_B, 0)[:, None]) & ~reset_B[:, None]
    return reset_B, _outer_sum(window, window_BU, feature_map) + _outer_sum(row, row_BT, feature_map)


def _outer_sum(tokens: _Tokens, mask_BA: Array | None, feature_map: str) -> Float[Array, "B K P E"]:
    """Sum of phi(k) v^T over the tokens where the mask holds."""
    phi = FEATURE_MAPS[feature_map](tokens.key if tokens.grouped_key is None else tokens.grouped_key)
    if mask_BA is not None:
        phi = jnp.where(mask_BA[:, :, None, None], phi, 0)
    return product("bakp,bake->bkpe", phi, tokens.value)


def _last(x: Array, count: int) -> Array:
    return x[:, x.shape[1] - count :]
