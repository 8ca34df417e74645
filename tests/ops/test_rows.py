"""Ops along tokens that are split over devices give what they give on one, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.ops.causal_conv import causal_conv
from lin_jax.ops.layout import token_layout
from lin_jax.ops.rows import convolve, delayed, positions
from tests.ops.sharded_cases import SEGMENTS, B, E, H, T, assert_alike, make_shards, normal

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def shards():
    return make_shards()


def test_positions_shifts_and_convolutions_over_parts(shards):
    ids_BT = jnp.asarray(SEGMENTS)
    expected_BT = token_layout(ids_BT, jnp.zeros(B, jnp.int32)).position_BT
    np.testing.assert_array_equal(jax.jit(lambda ids: positions(ids, shards))(ids_BT), expected_BT)
    arguments = {"x_BTHE": normal(0, B, T, H, E), "filter_WH": normal(1, 9, H)}
    assert_alike(
        lambda x: causal_conv(**x, segment_ids_BT=ids_BT) + causal_conv(**x),
        lambda x: (
            convolve(**x, segment_ids_BT=ids_BT, shards=shards) + convolve(**x, segment_ids_BT=None, shards=shards)
        ),
        arguments,
    )
    before = lambda x: jnp.pad(x["x"], ((0, 0), (1, 0), (0, 0)))[:, :-1]  # noqa: E731
    assert_alike(before, lambda x: delayed(x["x"], shards), {"x": normal(0, B, T, 3)})
