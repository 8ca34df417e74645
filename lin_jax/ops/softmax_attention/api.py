"""Softmax attention over whole rows, to the row itself or to a memory, and LongLoRA's over groups."""

# Letters beyond the legend: A = tokens that may be seen: all of the row, or those of the memory.

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lin_jax.ops.layout import token_layout
from lin_jax.ops.product import factors
from lin_jax.ops.shards import Shards
from lin_jax.ops.softmax_attention.splash import refusal, splash_attention
from lin_jax.ops.softmax_attention.whole_row import whole_row_attention
from lin_jax.ops.target import target
from lin_jax.ops.toeplitz import toeplitz


def softmax_attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BAKD: Float[Array, "B A K D"],
    v_BAKE: Float[Array, "B A K E"],
    segment_ids_BT: Int[Array, "B T"] | None = None,
    *,
    memory_ids_BA: Int[Array, "B A"] | None = None,
    bias_XH: Float[Array, "X #H"] | None = None,
    bias_HTA: Float[Array, "#H T A"] | None = None,
    causal: bool = True,
    window: int | None = None,
    score_scale: float | None = None,
    shards: Shards | None = None,
) -> Float[Array, "B T H E"]:
    """Return y_t = sum over s of softmax(score_scale q_t . k_s + bias_ts) v_s, over tokens s of the same sequence.

    By a kernel that never holds all scores, where there is one and neither bias, window, memory nor another scale asks
    for more than it has: on an NVIDIA GPU cuDNN's flash attention, on a TPU JAX's splash attention, which runs on
    arrays of one device.

    Args:
        q_BTHD: queries. H is a multiple of K; query head h uses key/value head h // (H / K).
        k_BAKD: keys: A is T, or the length of a memory, which needs causal=False.
        v_BAKE: values.
        segment_ids_BT: every run of equal ids is a sequence of its own; None is one sequence. With `memory_ids_BA` a
            query sees the tokens of the memory that have its id, and gives 0 where there are none.
        memory_ids_BA: segments of a memory, 0 for padding, which is not seen; None: there is no memory, or all of it is
            one segment.
        bias_XH: added to the scores, by distance d = t - s. Causal: row d of at least T. Otherwise row d + A - 1 of
            T + A - 1.
        bias_HTA: added to the scores, as it is.
        causal: whether a token sees only itself and earlier ones.
        window: a token sees those at distances below it, on both sides if not causal; None: at all.
        score_scale: None is 1 / sqrt(D).
        shards: how arrays are split over a mesh; None: they are whole. A row that is split takes no memory and no bias.

    Raises:
        ValueError: what does not fit together.
    """
    memory = k_BAKD.shape[1] != q_BTHD.shape[1] or memory_ids_BA is not None
    _check(q_BTHD, k_BAKD, segment_ids_BT, memory_ids_BA, bias_XH, causal, window)
    given = {
        "q_BTHD": q_BTHD,
        "k_BAKD": k_BAKD,
        "v_BAKE": v_BAKE,
        "segment_ids_BT": segment_ids_BT,
        "memory_ids_BA": memory_ids_BA,
        "bias_XH": bias_XH,
        "bias_HTA": bias_HTA,
    }
    if shards is not None and shards.parts > 1:
        if memory or bias_XH is not None or bias_HTA is not None:
            raise ValueError("softmax attention with a memory or a bias is not for rows that are split over a mesh")
        return whole_row_attention(
            q_BTHD,
            k_BAKD,
            v_BAKE,
            segment_ids_BT,
            shards,
            activation="softmax",
            score_scale=q_BTHD.shape[-1] ** -0.5 if score_scale is None else score_scale,
            causal=causal,
            window=window,
        )
    if shards is not None:

        def of_part(**part: Any) -> Array:
            return softmax_attention(**part, causal=causal, window=window, score_scale=score_scale)

        return shards.run(of_part, given, AXES, "BTHE", (*q_BTHD.shape[:3], v_BAKE.shape[3]))

    run_BT = None
    if segment_ids_BT is not None and not memory:
        run_BT = token_layout(segment_ids_BT, jnp.zeros(segment_ids_BT.shape[0], jnp.int32)).run_BT
    biased = bias_XH is not None or bias_HTA is not None
    plain = causal and not (memory or biased) and window is None and score_scale is None
    if plain and target().platform == "tpu" and refusal(q_BTHD, v_BAKE) is None:
        return splash_attention(q_BTHD, k_BAKD, v_BAKE, run_BT)
    mask_B1TA = _seen(segment_ids_BT, memory_ids_BA, run_BT, window, q_BTHD.shape[1], k_BAKD.shape[1])
    kernel = plain and mask_B1TA is None and _has_flash_attention(q_BTHD)
    implementation: Literal["cudnn", "xla"] = "cudnn" if kernel else "xla"
    q, k, v = factors(q_BTHD, k_BAKD, v_BAKE)
    y_BTHE = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=_bias(bias_XH, bias_HTA, causal, q_BTHD.shape[1], k_BAKD.shape[1]),
        mask=mask_B1TA,
        scale=score_scale,
        is_causal=causal,
        implementation=implementation,
    ).astype(v_BAKE.dtype)
    if not memory or mask_B1TA is None:
        return y_BTHE
    return jnp.where(jnp.any(mask_B1TA, axis=3)[:, 0, :, None, None], y_BTHE, 0)


# The axes of each array, by which `Shards` splits it. Only rows and heads are split here, so T and A are whole.
AXES = {
    "q_BTHD": "BTHD",
    "k_BAKD": "BAKD",
    "v_BAKE": "BAKE",
    "segment_ids_BT": "BT",
    "memory_ids_BA": "BA",
    "bias_XH": "XH",
    "bias_HTA": "HTA",
}


def _check(
    q: Array,
    k: Array,
    ids: Array | None,
    memory_ids: Array | None,
    bias_XH: Array | None,
    causal: bool,
    window: int | None,
) -> None:
    T, A = q.shape[1], k.shape[1]
    if memory_ids is None and A != T and ids is not None:
        raise ValueError(f"segments of {T} queries and a memory of {A} tokens need memory_ids_BA")
    if causal and (A != T or memory_ids is not None):
        raise ValueError("attention to a memory needs causal=False")
    if window is not None and (window < 1 or A != T or memory_ids is not None):
        raise ValueError(f"window={window} must be at least 1, and there is none over a memory")
    if bias_XH is not None:
        short, wrong = causal and bias_XH.shape[0] < T, not causal and bias_XH.shape[0] != T + A - 1
        if short or wrong:
            needed = f"at least {T}" if causal else f"{T + A - 1}"
            raise ValueError(f"bias_XH needs {needed} rows, one a distance, but has {bias_XH.shape[0]}")


def _seen(
    ids_BT: Array | None, memory_ids_BA: Array | None, run_BT: Array | None, window: int | None, T: int, A: int
) -> Bool[Array, "#B 1 T A"] | None:
    """Return which tokens each query sees, but for causality; None: all."""
    mask = None
    if memory_ids_BA is not None:
        own_BT = jnp.ones_like(memory_ids_BA[:, :1]) if ids_BT is None else ids_BT
        mask = (own_BT[:, None, :, None] == memory_ids_BA[:, None, None]) & (memory_ids_BA != 0)[:, None, None]
        mask = jnp.broadcast_to(mask, (mask.shape[0], 1, T, A))
    elif run_BT is not None:
        mask = (run_BT[:, :, None] == run_BT[:, None, :])[:, None]
    if window is not None:
        index_T = jnp.arange(T, dtype=jnp.int32)
        near = (jnp.abs(index_T[:, None] - index_T[None]) < window)[None, None]
        mask = near if mask is None else mask & near
    return mask


def _bias(
    bias_XH: Array | None, bias_HTA: Array | None, causal: bool, T: int, A: int
) -> Float[Array, "1 #H T A"] | None:
    """Return the sum of both, or None."""
    by_distance = None if bias_XH is None else toeplitz(bias_XH, 0 if causal else A - 1, T, A, 0)
    given = [bias for bias in (by_distance, bias_HTA) if bias is not None]
    return sum(given[1:], given[0])[None] if given else None


def _has_flash_attention(q_BTHD: Array) -> bool:
    """Return whether cuDNN computes it: 16-bit types and head sizes that are multiples of 8 up to 128."""
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
    """Return causal softmax attention inside groups of T / split tokens, moved by half a group for half of the heads.

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
    """Return softmax attention inside groups of the row rolled to the left by `shift`; the result is rolled back."""
    B, T, H, E = v.shape
    padding = -T % G
    position_BT = jnp.broadcast_to(jnp.arange(T + padding, dtype=jnp.int32)[None], (B, T + padding))
    run_BT = jnp.pad(run_BT, ((0, 0), (0, padding)))
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))

    def grouped(x: Array) -> Array:
        return jnp.roll(x, -shift, axis=1).reshape(B * (T + padding) // G, G, *x.shape[2:])

    mask = None if wraps else _near(grouped(position_BT), grouped(run_BT), G)
    wide_q, wide_k, wide_v = factors(grouped(q), grouped(k), grouped(v))
    y = jax.nn.dot_product_attention(wide_q, wide_k, wide_v, mask=mask, is_causal=wraps).astype(v.dtype)
    return jnp.roll(y.reshape(B, T + padding, H, E), shift, axis=1)[:, :T]


def _near(position: Int[Array, "N G"], run: Int[Array, "N G"], G: int) -> Bool[Array, "N 1 G G"]:
    """Return whether a token may see another: earlier, of the same sequence, and not from the row's other end."""
    distance = position[:, :, None] - position[:, None, :]
    return ((distance >= 0) & (distance < G) & (run[:, :, None] == run[:, None, :]))[:, None]
