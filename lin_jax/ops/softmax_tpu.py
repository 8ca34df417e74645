"""Causal softmax attention on TPUs by splash attention: scores a tile at a time, those above the diagonal never."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows and columns of a tile, at most; the kernel's own default of 128 keeps its matrix units mostly idle. Not measured.
TILE = 512
# Tiles are made of whole registers.
LANES = 128


def refusal(q_BTHD: Float[Array, "B T H D"], v_BTKE: Float[Array, "B T K E"]) -> str | None:
    """Why it cannot run for these arrays, or None."""
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
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((T, T))] * H),
        block_sizes=splash.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), tile)),
        interpret=interpret,
    )

    def of_row(q: Array, k: Array, v: Array, run_T: Array | None = None) -> Array:
        ids = None if run_T is None else splash.SegmentIds(run_T, run_T)
        return kernel(q, k, v, segment_ids=ids)

    scaled = (q_BTHD * D**-0.5).astype(q_BTHD.dtype)
    arrays = (jnp.swapaxes(x, 1, 2) for x in (scaled, k_BTKD, v_BTKE))
    return jnp.swapaxes(jax.vmap(of_row, in_axes=(0, 0, 0, None if run_BT is None else 0))(*arrays, run_BT), 1, 2)
