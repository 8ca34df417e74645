"""Augmented attention of rows that are split over devices is that of one, in values and gradients."""

import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.ops.layout import token_layout
from lin_jax.ops.linear_attention import AttentionArrays, AttentionOptions, attend
from tests.ops.sharded_cases import SEGMENTS, B, D, E, H, K, P, T, assert_alike, make_shards, normal

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def shards():
    return make_shards()


@pytest.mark.parametrize(
    ("segments", "R", "W", "local", "own", "feature_map"),
    [
        (False, 1, 6, "relu2", False, "unit"),
        (False, 3, 12, "softmax", True, "elu1"),
        (True, 1, 6, "relu2", False, "identity"),
        (True, 2, 3, "softmax", True, "elu1"),
    ],
)
def test_augmented_attention_over_parts_of_rows_and_heads(shards, segments, R, W, local, own, feature_map):
    ids_BT = jnp.asarray(SEGMENTS if segments else np.ones_like(SEGMENTS))
    position_BT = token_layout(ids_BT, jnp.zeros(B, jnp.int32)).position_BT
    options = {"local": local, "feature_map": feature_map, "group_size": 4, "local_groups": R, "score_scale": 0.3}
    rows = {"segment_ids_BT": ids_BT if segments else None}
    arguments = {
        "q_BTHD": normal(0, B, T, H, D),
        "k_BTKD": normal(1, B, T, K, D),
        "v_BTKE": normal(2, B, T, K, E),
        "conv_WH": normal(3, W, H),
        "alpha_H": normal(4, H),
    }
    if own:
        arguments |= {"grouped_q_BTHP": normal(5, B, T, H, P), "grouped_k_BTKP": normal(6, B, T, K, P)}

    def one(x):
        return attend(AttentionArrays(**x), AttentionOptions(**options), **rows)[0]

    def several(x):
        more = {"shards": shards, "position_BT": position_BT}
        return attend(AttentionArrays(**x), AttentionOptions(**options), **rows, **more)[0]

    assert_alike(one, several, arguments)


def test_parts_shorter_than_a_window_are_refused(shards):
    q, k, v = normal(0, B, T, H, D), normal(1, B, T, K, D), normal(2, B, T, K, E)
    position_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    with pytest.raises(ValueError, match="parts of 12 tokens are shorter than the 16 that the next one needs"):
        options = AttentionOptions(group_size=4, local_groups=5)
        attend(AttentionArrays(q, k, v), options, shards=shards, position_BT=position_BT)
