"""Attention of the scores of whole rows that are split over devices: every device gathers the keys and values."""

# Letters beyond the legend: A = tokens that may be seen: all of the row.

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.ops.activations import ACTIVATIONS
from lin_jax.ops.collectives import whole_rows
from lin_jax.ops.layout import token_layout
from lin_jax.ops.product import product
from lin_jax.ops.shards import Shards

# Queries of a device whose scores for the whole row are in memory at a time.
QUERIES = 256

# The axes of each array, by which `Shards` splits it. Every device has the bias of all distances.
AXES = {"q_BTHD": "BTHD", "k_BTKD": "BTKD", "v_BTKE": "BTKE", "segment_ids_BT": "BT", "bias_T": "X"}


def whole_row_attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKE: Float[Array, "B T K E"],
    segment_ids_BT: Int[Array, "B T"] | None,
    shards: Shards,
    *,
    activation: str,
    score_scale: float,
    bias_T: Float[Array, " T"] | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Float[Array, "B T H E"]:
    """Return y_t = sum over s <= t of a(score_scale q_t . k_s + bias_{t-s}) v_s, over tokens of the same sequence.

    Args:
        q_BTHD: queries. H is a multiple of K; query head h uses key/value head h // (H / K).
        k_BTKD: keys.
        v_BTKE: values.
        segment_ids_BT: every run of equal ids is a sequence of its own; None is one sequence.
        shards: how the arrays are split over a mesh.
        activation: a: softmax, relu2 or laplace.
        score_scale: factor of q . k.
        bias_T: added to the score, by distance; only if causal.
        causal: whether a token sees only itself and earlier ones.
        window: a token sees those at distances below it, on both sides if not causal; None: at all.
    """

    def of_part(
        q_BTHD: Array, k_BTKD: Array, v_BTKE: Array, segment_ids_BT: Array | None, bias_T: Array | None
    ) -> Array:
        T = q_BTHD.shape[1]
        k_BAKD, v_BAKE = (whole_rows(x, shards.tokens) for x in (k_BTKD, v_BTKE))
        ids_BA = None if segment_ids_BT is None else whole_rows(segment_ids_BT, shards.tokens)
        chunk = min(T, QUERIES)
        parts = -(-T // chunk)
        padded = jnp.pad(q_BTHD, ((0, 0), (0, parts * chunk - T), (0, 0), (0, 0)))
        split = jnp.moveaxis(padded.reshape(padded.shape[0], parts, chunk, *padded.shape[2:]), 1, 0)
        first = jax.lax.axis_index(shards.tokens) * T + chunk * jnp.arange(parts, dtype=jnp.int32)

        @jax.checkpoint
        def rows(part: tuple[Array, Array]) -> Array:
            return _attend(*part, k_BAKD, v_BAKE, ids_BA, bias_T, activation, score_scale, causal, window)

        y = jnp.moveaxis(jax.lax.map(rows, (split, first)), 0, 1)
        return y.reshape(y.shape[0], parts * chunk, *y.shape[3:])[:, :T]

    arrays = {"q_BTHD": q_BTHD, "k_BTKD": k_BTKD, "v_BTKE": v_BTKE, "segment_ids_BT": segment_ids_BT, "bias_T": bias_T}
    return shards.run(of_part, arrays, AXES, "BTHE", (*q_BTHD.shape[:3], v_BTKE.shape[3]))


def _attend(
    q_BTHD: Array,
    first: Array,
    k_BAKD: Array,
    v_BAKE: Array,
    ids_BA: Array | None,
    bias_A: Array | None,
    activation: str,
    score_scale: float,
    causal: bool,
    window: int | None,
) -> Float[Array, "B T H E"]:
    """Return outputs of queries, the first of which is token `first` of the row, for all A tokens of it."""
    (B, T, H, D), (A, K) = q_BTHD.shape, k_BAKD.shape[1:3]
    # Queries behind the end, which fill the last chunk up, are cut off later.
    index_T, index_A = first + jnp.arange(T, dtype=jnp.int32), jnp.arange(A, dtype=jnp.int32)
    distance_TA = index_T[:, None] - index_A[None]
    mask_BTA = (distance_TA >= 0 if causal else jnp.ones_like(distance_TA, bool))[None]
    if window is not None:
        mask_BTA = mask_BTA & (jnp.abs(distance_TA) < window)[None]
    if ids_BA is not None:
        run_BA = token_layout(ids_BA, jnp.zeros(B, jnp.int32)).run_BT
        mask_BTA = mask_BTA & (jnp.take(run_BA, index_T, axis=1, mode="clip")[:, :, None] == run_BA[:, None])
    score = score_scale * product("btkjd,bakd->bkjta", q_BTHD.reshape(B, T, K, H // K, D), k_BAKD)
    if bias_A is not None:
        score += _by_distance(bias_A.astype(jnp.float32), first, T)[None, None, None]
    weights = ACTIVATIONS[activation].weights(score, mask_BTA[:, None, None]).astype(v_BAKE.dtype)
    y = product("bkjta,bake->btkje", weights, v_BAKE)
    return y.astype(v_BAKE.dtype).reshape(B, T, H, -1)


def _by_distance(bias_A: Float[Array, " A"], first: Array, T: int) -> Float[Array, "T A"]:
    """Return a matrix whose row i, column j is the entry of distance first + i - j; anything where that is negative.

    Row i is a stretch of one line of entries: the line repeated, and cut one entry shorter, makes all rows.
    """
    A = bias_A.shape[0]
    period = T + A
    # The line's entry m has distance first + T - 1 - m; farther than A - 1 and below 0 there is filling.
    line = jnp.concatenate([jnp.zeros(T, bias_A.dtype), bias_A[::-1], jnp.zeros(A + T, bias_A.dtype)])
    line = jax.lax.dynamic_slice(line, (T + A - 1 - (first + T - 1),), (period,))
    repeated = jnp.broadcast_to(line[None], (T, period)).reshape(T * period)
    return repeated[T - 1 : T * period - 1].reshape(T, period - 1)[:, :A]
