"""Causal softmax attention on TPUs by splash attention: scores a tile at a time, those above the diagonal never."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows and columns of a tile, at most; the kernel's own default of 128 keeps its matrix units mostly idle. Not measured.
TILE = 512
# Tiles are made of whole registers.
LANES = 128


def refusal(q_BTHD: Any, v_BTKE: Any) -> str | None:
    """Why it cannot run for arrays of these shapes, or None."""
    T, sizes = q_BTHD.shape[1], (q_BTHD.shape[3], v_BTKE.shape[3])
    if T % LANES:
        return f"T={T} is no multiple of {LANES}"
    if any(size % LANES for size in sizes):
        return f"head sizes {sizes} are no multiples of {LANES}"
    return None


def splash_attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKE: Float[Array, "B T K E"],
    run_BT: Int[Array, "B T"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T H E"]:
    """`softmax_attention` of arrays on one device.

    Args:
        q_BTHD: queries; query head h uses key/value head h // (H / K).
        k_BTKD: keys.
        v_BTKE: values.
        run_BT: number of the sequence that a token belongs to; None is one sequence.
        interpret: simulate the kernel, on any device.
    """
    # Imported here: it is for TPUs alone, and takes Pallas with it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, H, D = q_BTHD.shape[1:]
    tile = next(size for size in (TILE, TILE // 2, LANES) if T % size == 0)
    blocks = splash.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_kv_compute=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_kv_dkv_compute=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * H)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)

    def of_row(q: Array, k: Array, v: Array, run_T: Array | None = None) -> Array:
        ids = None if run_T is None else splash.SegmentIds(run_T, run_T)
        return kernel(q, k, v, segment_ids=ids)

    scaled = (q_BTHD * D**-0.5).astype(q_BTHD.dtype)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (scaled, k_BTKD, v_BTKE))
    y = jax.vmap(of_row, in_axes=(0, 0, 0, None if run_BT is None else 0))(q, k, v, run_BT)
    return jnp.swapaxes(y, 1, 2)
