"""Augmented linear attention by its definition, token by token, in float32."""

# Letters beyond the legend: A = tokens that may be seen: those that a state remembers, then the row's; Y = tokens
# that a state remembers, as if they stood before the row.

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lin_jax.ops.activations import ACTIVATIONS
from lin_jax.ops.layout import TokenLayout, token_layout
from lin_jax.ops.linear_attention.feature_maps import FEATURE_MAPS, NO_ARRAYS, MapArrays
from lin_jax.ops.linear_attention.inputs import Inputs
from lin_jax.ops.linear_attention.state import Context, context_tokens


def attend(inputs: Inputs) -> Float[Array, "B T H E"]:
    """One output at a time: its weight for every token of the row and of the context, and the sum.

    This is the definition that every other implementation is compared with; it takes time and memory T * T.
    """
    initial, arrays = inputs.initial_state, inputs.arrays
    layout = token_layout(inputs.segment_ids_BT, initial.length_B)
    context = context_tokens(initial, inputs.options)
    own_q, own_k = arrays.grouped_q_BTHP, arrays.grouped_k_BTKP
    grouped = None if own_q is None or own_k is None else (own_q, own_k)
    rows = (arrays.q_BTHD, arrays.k_BTKD, arrays.v_BTKE, grouped, layout, context, initial.state_BKPE)
    y_BTHE = jax.vmap(lambda *row: _attend_row(inputs, *row))(*rows)
    return y_BTHE.astype(arrays.v_BTKE.dtype)


def _attend_row(
    inputs: Inputs,
    q_THD: Array,
    k_TKD: Array,
    v_TKE: Array,
    grouped: tuple[Array, Array] | None,
    layout: TokenLayout,
    context: Context,
    state_KPE: Array,
) -> Float[Array, "T H E"]:
    """One row; the fields of `layout` and `context` come without their axis B."""
    H, K, G, R = q_THD.shape[1], k_TKD.shape[1], inputs.options.group_size, inputs.options.local_groups

    def per_query_head(x: Array) -> Array:
        return jnp.repeat(x.astype(jnp.float32), H // K, axis=1)

    # Every token that may be seen, context first: A of them.
    k_AHD = per_query_head(jnp.concatenate([context.key_BYKD, k_TKD]))
    v_AHE = per_query_head(jnp.concatenate([context.value_BYKE, v_TKE]))
    q_THD = q_THD.astype(jnp.float32)
    grouped_q_THP, grouped_k_AHP = q_THD, k_AHD
    if grouped is not None and context.grouped_key_BYKP is not None:
        grouped_q_THP = grouped[0].astype(jnp.float32)
        grouped_k_AHP = per_query_head(jnp.concatenate([context.grouped_key_BYKP, grouped[1]]))
    phi = inputs.options.inner_map.apply
    state_HPE = jnp.repeat(state_KPE, H // K, axis=0)

    position_A = jnp.concatenate([context.position_BY, layout.position_BT])
    run_A = jnp.concatenate([jnp.zeros_like(context.position_BY), layout.run_BT])
    known_A = jnp.concatenate([context.position_BY >= 0, layout.real_BT])
    key_known_A = jnp.concatenate([~context.folded_BY, layout.real_BT])

    def token(t):
        run, position = layout.run_BT[t], layout.position_BT[t]
        distance_A = position - position_A
        groups_A = position // G - position_A // G
        same_A = run_A == run
        if inputs.options.causal:
            local_A = same_A & key_known_A & (distance_A >= 0) & (groups_A < R)
            grouped_A = same_A & key_known_A & (groups_A >= R)
        else:
            local_A = same_A & key_known_A & (jnp.abs(groups_A) < R)
            grouped_A = same_A & key_known_A

        y_HE = jnp.zeros(v_AHE.shape[1:])
        if inputs.options.scored:
            score_HA = inputs.options.score_scale * jnp.einsum("hd,ahd->ha", q_THD[t], k_AHD)
            if inputs.arrays.bias_XH is not None:
                zero = 0 if inputs.options.causal else R * G - 1
                index_A = jnp.clip(distance_A + zero, 0, inputs.arrays.bias_XH.shape[0] - 1)
                score_HA += inputs.arrays.bias_XH[index_A].T
            weight_HA = ACTIVATIONS[inputs.options.local].weights(score_HA, local_A[None])
            y_HE += jnp.einsum("ha,ahe->he", weight_HA, v_AHE)
        if inputs.options.grouped:
            phi_q_HP = phi(grouped_q_THP[t])
            weight_HA = jnp.where(grouped_A, jnp.einsum("hp,ahp->ha", phi_q_HP, phi(grouped_k_AHP)), 0)
            far_HE = jnp.einsum("ha,ahe->he", weight_HA, v_AHE)
            far_HE += jnp.where(run == 0, jnp.einsum("hp,hpe->he", phi_q_HP, state_HPE), 0)
            y_HE += inputs.alpha_H[:, None] * far_HE
        if inputs.arrays.conv_WH is not None:
            W = inputs.arrays.conv_WH.shape[0]
            tap_A = same_A & known_A & (distance_A >= 0) & (distance_A < W)
            weight_AH = jnp.where(tap_A[:, None], inputs.arrays.conv_WH[jnp.clip(distance_A, 0, W - 1)], 0)
            y_HE += jnp.einsum("ah,ahe->he", weight_AH, v_AHE)
        return jnp.where(layout.real_BT[t], y_HE, 0)

    return jax.lax.map(token, jnp.arange(q_THD.shape[0]))


def attend_memory(
    q_BTHD: Float[Array, "B T H D"],
    k_BAKD: Float[Array, "B A K D"],
    v_BAKE: Float[Array, "B A K E"],
    real_BA: Bool[Array, "B A"] | None,
    feature_map: str,
    features: MapArrays = NO_ARRAYS,
) -> Float[Array, "B T H E"]:
    """Return linear attention to a memory by its definition: a weight for every query and real token of the memory."""
    sharing, phi = q_BTHD.shape[2] // k_BAKD.shape[2], FEATURE_MAPS[feature_map].apply
    phi_q_BTHP = phi(q_BTHD.astype(jnp.float32), *features.query)
    phi_k_BAHP = jnp.repeat(phi(k_BAKD.astype(jnp.float32), *features.key), sharing, axis=2)
    v_BAHE = jnp.repeat(v_BAKE.astype(jnp.float32), sharing, axis=2)
    weight_BHTA = jnp.einsum("bthp,bahp->bhta", phi_q_BTHP, phi_k_BAHP)
    if real_BA is not None:
        weight_BHTA = jnp.where(real_BA[:, None, None], weight_BHTA, 0)
        v_BAHE = jnp.where(real_BA[..., None, None], v_BAHE, 0)
    return jnp.einsum("bhta,bahe->bthe", weight_BHTA, v_BAHE).astype(q_BTHD.dtype)
