"""The public functions of augmented linear attention."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.ops.layout import token_layout
from lin_jax.ops.linear_attention.arguments import AttentionArrays, AttentionOptions, per_head, with_features
from lin_jax.ops.linear_attention.feature_maps import MapArrays
from lin_jax.ops.linear_attention.inputs import make_inputs, normalised
from lin_jax.ops.linear_attention.select import FORMS, KERNELS, Choice, choose
from lin_jax.ops.linear_attention.sharded import state_before
from lin_jax.ops.linear_attention.state import AttentionState, Pending, advance
from lin_jax.ops.shards import Shards
from lin_jax.ops.target import target


def attend(
    arrays: AttentionArrays,
    options: AttentionOptions,
    *,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    initial_state: AttentionState | None = None,
    aligned_state: bool = False,
    return_state: bool = False,
    shards: Shards | None = None,
    position_BT: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H E"], AttentionState | None]:
    """Return local attention in a window of groups, linear attention to the groups before it, and a convolution.

    With position t in its sequence, group g(t) = floor(t / G) and all sums over tokens s of the same sequence:

        local_t   = sum over s <= t with g(t) - g(s) < R of  a(score(q_t, k_s)) v_s
        grouped_t = phi(q_t) . sum over s with g(t) - g(s) >= R of  phi(k_s) v_s^T
        conv_t    = sum over j = 0..W-1 of  w_j v_{t-j}
        y_t       = local_t + alpha grouped_t + conv_t

    with score(q, k) = score_scale q . k + bias[t - s]. When not causal, local_t is over |g(t) - g(s)| < R and grouped_t
    over the whole sequence, own group included, as in the released FLASH. Source: You et al., ICML 2024, section 4, and
    the released code, whose default for a is relu2 on normalised q and k and for phi the identity.

    Args:
        arrays: what is multiplied.
        options: what is static.
        segment_ids_BT: every run of equal ids is a sequence of its own, with groups counted from its first token;
            0 is padding, which is not seen and gives 0. None: every row is one sequence.
        initial_state: what went before; the run of the row's first token continues it, if that token is real.
        aligned_state: whether the caller knows that the initial state ends with a group in all rows; without segment
            ids groups then lie alike in all rows, which takes half the local work.
        return_state: also return the state after the last real token (of its sequence; a row of padding keeps its).
        shards: how arrays are split over a mesh, causal where tokens are; not with states. None: they are whole.
        position_BT: position of each token in its sequence; only where tokens are split.

    Returns:
        y_BTHE in the type of v, and the final state if asked for.

    Raises:
        ValueError: shapes or options that do not fit together, a named implementation that cannot run, or a part of a
            row that is shorter than what the next one needs of it.
    """
    if shards is not None:
        if initial_state is not None or return_state:
            raise ValueError("arrays that are split over a mesh have no states: give whole ones, or no shards")
        return _attend_in_parts(arrays, options, segment_ids_BT, shards, position_BT), None
    inputs = make_inputs(
        arrays,
        options,
        segment_ids_BT=segment_ids_BT,
        initial_state=initial_state,
        aligned_state=aligned_state,
        return_state=return_state,
    )
    name, folded_BKPE = choose(inputs).implementation, None
    if not arrays.q_BTHD.shape[1]:
        y_BTHE = jnp.zeros((*arrays.q_BTHD.shape[:3], arrays.v_BTKE.shape[-1]), arrays.v_BTKE.dtype)
        return y_BTHE, inputs.initial_state if return_state else None
    if name in KERNELS:
        y_BTHE, folded_BKPE = KERNELS[name].attend(inputs, target().device_kind)
    else:
        y_BTHE = FORMS[name](normalised(inputs))
    if not return_state:
        return y_BTHE, None
    layout = token_layout(inputs.segment_ids_BT, inputs.initial_state.length_B)
    tokens = Pending(inputs.arrays.k_BTKD, inputs.arrays.grouped_k_BTKP, inputs.arrays.v_BTKE)
    return y_BTHE, advance(inputs.initial_state, tokens, layout, inputs.options, folded_BKPE)


def _attend_in_parts(
    arrays: AttentionArrays,
    options: AttentionOptions,
    segment_ids_BT: Array | None,
    shards: Shards,
    position_BT: Array | None,
) -> Float[Array, "B T H E"]:
    """Return `attend` of every device's part, which is given a state that stands for the parts before it."""
    if shards.parts > 1 and position_BT is None:
        raise ValueError("rows that are split over a mesh need position_BT, the position of each token in its sequence")
    arrays, options = with_features(arrays, options)
    arrays = dataclasses.replace(arrays, alpha_H=per_head(arrays.alpha_H, arrays.q_BTHD.shape[2]))

    def of_part(ids_BT: Array | None, position_BT: Array | None, **part: Any) -> Array:
        arrays, state, aligned = AttentionArrays(**part), None, False
        if position_BT is not None:
            state, aligned = state_before(shards, arrays, options, ids_BT, position_BT)
        return attend(arrays, options, segment_ids_BT=ids_BT, initial_state=state, aligned_state=aligned)[0]

    given = {**vars(arrays), "ids_BT": segment_ids_BT, "position_BT": position_BT if shards.parts > 1 else None}
    return shards.run(of_part, given, AXES, "BTHE", (*arrays.q_BTHD.shape[:3], arrays.v_BTKE.shape[3]))


# The axes of each array, by which `Shards` splits it.
AXES = {
    "q_BTHD": "BTHD",
    "k_BTKD": "BTKD",
    "v_BTKE": "BTKE",
    "grouped_q_BTHP": "BTHP",
    "grouped_k_BTKP": "BTKP",
    "bias_XH": "XH",
    "alpha_H": "H",
    "conv_WH": "WH",
    "ids_BT": "BT",
    "position_BT": "BT",
}


def explain(
    arrays: AttentionArrays,
    options: AttentionOptions,
    *,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    initial_state: AttentionState | None = None,
    aligned_state: bool = False,
    return_state: bool = False,
) -> Choice:
    """Return which implementation `attend` takes for these arguments, and why.

    Raises:
        ValueError: as `attend` does.
    """
    inputs = make_inputs(
        arrays,
        options,
        segment_ids_BT=segment_ids_BT,
        initial_state=initial_state,
        aligned_state=aligned_state,
        return_state=return_state,
    )
    return choose(inputs)


def augmented_attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKE: Float[Array, "B T K E"],
    *,
    grouped_q_BTHP: Float[Array, "B T H P"] | None = None,
    grouped_k_BTKP: Float[Array, "B T K P"] | None = None,
    bias_XH: Float[Array, "X #H"] | None = None,
    alpha: Float[Array, " #H"] | Float[Array, ""] | float = 1.0,
    conv_WH: Float[Array, "W #H"] | None = None,
    features: MapArrays | None = None,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    initial_state: AttentionState | None = None,
    aligned_state: bool = False,
    return_state: bool = False,
    **options: Any,
) -> Float[Array, "B T H E"] | tuple[Float[Array, "B T H E"], AttentionState]:
    """Return `attend` of arguments that are given one by one.

    Args:
        q_BTHD: queries; arrays up to `features` are those of `AttentionArrays`.
        k_BTKD: keys.
        v_BTKE: values.
        grouped_q_BTHP: queries of the grouped branch where it has its own.
        grouped_k_BTKP: keys of the grouped branch.
        bias_XH: added to the score, by distance.
        alpha: weight of the grouped branch, one number or one a query head.
        conv_WH: causal filter.
        features: the arrays of a feature map that has some.
        segment_ids_BT: see `attend`, as what follows.
        initial_state: what went before.
        aligned_state: whether it ends with a group in all rows.
        return_state: also return the state after the last real token.
        options: of `AttentionOptions`: group_size, local_groups, local, score_scale, grouped, feature_map, normalise,
            causal, implementation.

    Returns:
        y_BTHE in the type of v, and the final state if asked for.

    Raises:
        ValueError: as `attend` does.
    """
    arrays = AttentionArrays(q_BTHD, k_BTKD, v_BTKE, grouped_q_BTHP, grouped_k_BTKP, bias_XH, alpha, conv_WH, features)
    y_BTHE, state = attend(
        arrays,
        AttentionOptions(**options),
        segment_ids_BT=segment_ids_BT,
        initial_state=initial_state,
        aligned_state=aligned_state,
        return_state=return_state,
    )
    return y_BTHE if state is None else (y_BTHE, state)
