"""Scores of whole rows with a scale, a bias by distance, and any activation; what softmax and quadratic kinds share."""

from jaxtyping import Array, Float

from lin_jax.attentions.base import Scoring
from lin_jax.layers.rows import Rows
from lin_jax.ops.linear_attention import AttentionArrays, AttentionOptions, attend
from lin_jax.ops.softmax_attention.whole_row import whole_row_attention


def attend_whole_rows(
    q_BTHD: Float[Array, "B T H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKE: Float[Array, "B T K E"],
    rows: Rows,
    *,
    activation: str,
    scoring: Scoring,
    causal: bool,
) -> Float[Array, "B T H E"]:
    """Return y_t = sum over s of a(scale q_t . k_s + bias_{t-s}) v_s, the sum over tokens of the same sequence.

    It is the local branch of augmented attention, of one group that spans the row.
    """
    bias_XH, shards = scoring.bias_XH, rows.shards
    if shards is not None and shards.parts > 1:
        return whole_row_attention(
            q_BTHD,
            k_BTKD,
            v_BTKE,
            rows.segment_ids_BT,
            shards,
            activation=activation,
            score_scale=scoring.scale,
            bias_T=None if bias_XH is None else bias_XH[:, 0],
        )
    options = AttentionOptions(
        group_size=q_BTHD.shape[1], local=activation, score_scale=scoring.scale, grouped=False, causal=causal
    )
    arrays = AttentionArrays(q_BTHD, k_BTKD, v_BTKE, bias_XH=bias_XH)
    return attend(arrays, options, segment_ids_BT=rows.segment_ids_BT, shards=shards)[0]
