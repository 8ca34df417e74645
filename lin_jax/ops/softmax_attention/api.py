"""Softmax attention over whole rows, and LongLoRA's over groups."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lin_jax.ops.layout import token_layout
from lin_jax.ops.product import factors
from lin_jax.ops.softmax_attention.splash import refusal, splash_attention
from lin_jax.ops.target import target


def softmax_attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKE: Float[Array, "B T K E"],
    segment_ids_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H E"]:
    """y_t = sum over s <= t of softmax(q_t . k_s / sqrt(D)) v_s, the sum over tokens of the same sequence.

    By a kernel that never holds all scores, where there is one: on an NVIDIA GPU cuDNN's flash attention, on a TPU
    JAX's splash attention, which runs on arrays of one device.

    Args:
        q_BTHD: queries. H is a multiple of K; query head h uses key/value head h // (H / K).
        k_BTKD: keys.
        v_BTKE: values.
        segment_ids_BT: every run of equal ids is a sequence of its own; None is one sequence.
    """
    run_BT = mask_B1TS = None
    if segment_ids_BT is not None:
        run_BT = token_layout(segment_ids_BT, jnp.zeros(segment_ids_BT.shape[0], jnp.int32)).run_BT
    if target().platform == "tpu" and refusal(q_BTHD, v_BTKE) is None:
        return splash_attention(q_BTHD, k_BTKD, v_BTKE, run_BT)
    if run_BT is not None:
        mask_B1TS = (run_BT[:, :, None] == run_BT[:, None, :])[:, None]
    implementation: Literal["cudnn", "xla"] = "cudnn" if mask_B1TS is None and _has_flash_attention(q_BTHD) else "xla"
    q, k, v = factors(q_BTHD, k_BTKD, v_BTKE)
    y_BTHE = jax.nn.dot_product_attention(q, k, v, mask=mask_B1TS, is_causal=True, implementation=implementation)
    return y_BTHE.astype(v_BTKE.dtype)


def _has_flash_attention(q_BTHD: Array) -> bool:
    """Whether cuDNN computes it: 16-bit types and head sizes that are multiples of 8 up to 128."""
    device, D = target(), q_BTHD.shape[-1]
    nvidia = device.platform == "gpu" and "NVIDIA" in device.device_kind
    return nvidia and q_BTHD.dtype.itemsize == 2 and D % 8 == 0 and D <= 128


def longlora_attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKE: Float[Array, "B T K E"],
    *,
    split: int,
    shift: str = "causal",
    segment_ids_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H E"]:
    """Causal softmax attention inside groups of T / split tokens, shifted by half a group for the second half of heads.

    Source: Chen et al., LongLoRA, 2023, and the code released with You et al., 2024. There the row is rolled, so that
    the first half group of a shifted head sits behind the last tokens and sees them: `shift="released"` does that,
    `shift="causal"` lets it see only itself. For an odd group the released code rolls back by one token less.

    Args:
        q_BTHD: queries. H is a multiple of K; query head h uses key/value head h // (H / K).
        k_BTKD: keys.
        v_BTKE: values.
        split: groups in a row; its last group may be short.
        shift: "causal" or "released".
        segment_ids_BT: every run of equal ids is a sequence of its own, 0 is padding; None is one sequence.

    Raises:
        ValueError: `shift="released"` with segments, or with a T that is no multiple of `split`.
    """
    B, T, H, _ = q_BTHD.shape
    if shift == "released" and (segment_ids_BT is not None or T % split):
        raise ValueError(f"shift=released needs whole rows of a multiple of {split} tokens, but T is {T}")
    G = -(-T // split)
    k_BTHD, v_BTHE = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k_BTKD, v_BTKE))
    run_BT = jnp.ones((B, T), jnp.int32)
    if segment_ids_BT is not None:
        run_BT = token_layout(segment_ids_BT, jnp.zeros(B, jnp.int32)).run_BT + 1
    half, wraps = H // 2, shift == "released"
    heads, shifted = ((q_BTHD[:, :, s], k_BTHD[:, :, s], v_BTHE[:, :, s]) for s in (slice(half), slice(half, None)))
    y = _in_groups(*heads, run_BT, G, 0, wraps)
    # Python's floor: for an odd group (-G) // 2 is one more than G // 2.
    z = _in_groups(*shifted, run_BT, G, -(-G // 2), wraps)
    if wraps and G % 2:
        z = jnp.roll(z, -1, axis=1)
    return jnp.concatenate([y, z], axis=2)


def _in_groups(q: Array, k: Array, v: Array, run_BT: Array, G: int, shift: int, wraps: bool) -> Array:
    """Softmax attention inside groups of the row rolled to the left by `shift`; the result is rolled back."""
    B, T, H, E = v.shape
    padding = -T % G
    position_BT = jnp.broadcast_to(jnp.arange(T + padding, dtype=jnp.int32)[None], (B, T + padding))
    run_BT = jnp.pad(run_BT, ((0, 0), (0, padding)))
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    grouped = lambda x: jnp.roll(x, -shift, axis=1).reshape(B * (T + padding) // G, G, *x.shape[2:])  # noqa: E731
    mask = None if wraps else _near(grouped(position_BT), grouped(run_BT), G)
    wide_q, wide_k, wide_v = factors(grouped(q), grouped(k), grouped(v))
    y = jax.nn.dot_product_attention(wide_q, wide_k, wide_v, mask=mask, is_causal=wraps).astype(v.dtype)
    return jnp.roll(y.reshape(B, T + padding, H, E), shift, axis=1)[:, :T]


def _near(position: Int[Array, "N G"], run: Int[Array, "N G"], G: int) -> Bool[Array, "N 1 G G"]:
    """Whether a token may see another: earlier, of the same sequence, and not from the row's other end."""
    distance = position[:, :, None] - position[:, None, :]
    return ((distance >= 0) & (distance < G) & (run[:, :, None] == run[:, None, :]))[:, None]
