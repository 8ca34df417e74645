"""Linear attention of one sequence to another, of another length: a state of the memory, made once, and its reading.

    y_t = phi(q_t) . sum over s of phi(k_s) v_s^T        over all real tokens s of the memory

A query sees the whole memory, wherever it stands, so that encoders' memories serve a whole generation.
"""

# Letters beyond the legend: A = tokens that may be seen: those of the memory.

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lin_jax.ops.linear_attention.feature_maps import FEATURE_MAPS
from lin_jax.ops.product import product


def memory_state(
    k_BAKD: Float[Array, "B A K D"],
    v_BAKE: Float[Array, "B A K E"],
    real_BA: Bool[Array, "B A"] | None,
    feature_map: str,
    *features: Array,
) -> Float[Array, "B K P E"]:
    """Return the sum of phi(k) v^T over the real tokens of a memory, in float32.

    Args:
        k_BAKD: keys.
        v_BAKE: values.
        real_BA: False for padding; None where there is none.
        feature_map: phi, a name in `FEATURE_MAPS`.
        features: the map's arrays for keys.
    """
    phi_BAKP = FEATURE_MAPS[feature_map].apply(k_BAKD, *features)
    if real_BA is not None:
        # Both, as what padding holds may be infinite.
        phi_BAKP = jnp.where(real_BA[..., None, None], phi_BAKP, 0)
        v_BAKE = jnp.where(real_BA[..., None, None], v_BAKE, 0)
    return product("bakp,bake->bkpe", phi_BAKP, v_BAKE)


def attend_memory(
    q_BTHD: Float[Array, "B T H D"], state_BKPE: Float[Array, "B K P E"], feature_map: str, *features: Array
) -> Float[Array, "B T H E"]:
    """Return what queries read from the state of a memory, in their type.

    Args:
        q_BTHD: queries; query head h uses key/value head h // (H / K).
        state_BKPE: from `memory_state`.
        feature_map: phi.
        features: the map's arrays for queries.
    """
    (B, T, H, _), K = q_BTHD.shape, state_BKPE.shape[1]
    phi_BTHP = FEATURE_MAPS[feature_map].apply(q_BTHD, *features)
    phi_BTKJP = phi_BTHP.reshape(B, T, K, H // K, phi_BTHP.shape[-1])
    y_BTKJE = product("btkjp,bkpe->btkje", phi_BTKJP, state_BKPE.astype(phi_BTKJP.dtype))
    return y_BTKJE.astype(q_BTHD.dtype).reshape(B, T, H, -1)
