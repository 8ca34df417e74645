"""Attention to whole rows that are split over devices is that of one, in values and gradients."""

import jax.numpy as jnp
import pytest

from lin_jax.ops.linear_attention import augmented_attention
from lin_jax.ops.softmax_attention.api import softmax_attention
from lin_jax.ops.softmax_attention.whole_row import whole_row_attention
from tests.ops.sharded_cases import SEGMENTS, B, D, H, K, T, assert_alike, make_shards, normal

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def shards():
    return make_shards()


def test_attention_to_whole_rows_gathers_keys_and_values(shards, monkeypatch):
    monkeypatch.setattr("lin_jax.ops.softmax_attention.whole_row.QUERIES", 5)  # several chunks, the last not full
    ids_BT = jnp.asarray(SEGMENTS)
    tokens = normal(0, B, T, H, D), normal(1, B, T, K, D), normal(2, B, T, K, D)
    for options in ({}, {"causal": False}, {"window": 7}, {"causal": False, "window": 15, "score_scale": 1.0}):

        def attention(x, shards, options=options):
            return softmax_attention(*x, ids_BT, **options, shards=shards)

        assert_alike(lambda x: attention(x, None), lambda x: attention(x, shards), tokens)
    arguments = dict(zip(("q_BTHD", "k_BTKD", "v_BTKE"), tokens, strict=True))
    arguments |= {"bias_T": normal(3, T)}

    def one(x):
        options = {"bias_XH": x["bias_T"][:, None], "grouped": False, "group_size": T, "score_scale": 0.2}
        return augmented_attention(x["q_BTHD"], x["k_BTKD"], x["v_BTKE"], local="laplace", **options)

    def several(x):
        return whole_row_attention(**x, segment_ids_BT=None, shards=shards, activation="laplace", score_scale=0.2)

    assert_alike(one, several, arguments)
