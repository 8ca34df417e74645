"""Ops on rows that are cut over devices give what they give on one, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from lin_jax.ops.causal_conv import causal_conv
from lin_jax.ops.layout import token_layout
from lin_jax.ops.linear_attention import AttentionArrays, AttentionOptions, attend, augmented_attention
from lin_jax.ops.rows import convolve, delayed, positions
from lin_jax.ops.shards import Shards
from lin_jax.ops.softmax_attention.api import softmax_attention
from lin_jax.ops.softmax_attention.whole_row import sharded_softmax, whole_row_attention

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, H, K, D, E, P = 2, 48, 4, 2, 5, 6, 7
# Runs within a part, over a border, over whole parts, a part of padding alone, and ids that come again.
SEGMENTS = np.ones((B, T), np.int32)
SEGMENTS[0, 5:37], SEGMENTS[0, 37:40], SEGMENTS[0, 40:] = 2, 0, 1
SEGMENTS[1, :3], SEGMENTS[1, 12:], SEGMENTS[1, 24:36], SEGMENTS[1, 36:46], SEGMENTS[1, 46:] = 0, 3, 0, 4, 0


@pytest.fixture(scope="module")
def shards():
    devices = np.array(jax.devices()).reshape(1, 4, 2)
    mesh = Mesh(devices, ("data", "sequence", "tensor"), axis_types=(AxisType.Auto,) * 3)
    return Shards(mesh, ("data",), ("sequence",), ("tensor",))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_alike(one, split, arguments, tolerance=2e-6):
    """Values and gradients of two functions of a dictionary of arrays."""

    def run(f):
        y, back = jax.vjp(f, arguments)
        return y, back(normal(9, *y.shape))[0]

    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(a).max() + 1e-30)  # noqa: E731
    jax.tree.map(compare, *jax.jit(lambda: (run(one), run(split)))())


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


def test_attention_to_whole_rows_gathers_keys_and_values(shards, monkeypatch):
    monkeypatch.setattr("lin_jax.ops.softmax_attention.whole_row.QUERIES", 5)  # several chunks, the last not full
    ids_BT = jnp.asarray(SEGMENTS)
    arguments = {"q_BTHD": normal(0, B, T, H, D), "k_BTKD": normal(1, B, T, K, D), "v_BTKE": normal(2, B, T, K, D)}
    assert_alike(
        lambda x: softmax_attention(**x, segment_ids_BT=ids_BT),
        lambda x: sharded_softmax(**x, segment_ids_BT=ids_BT, shards=shards),
        arguments,
    )
    arguments |= {"bias_T": normal(3, T)}

    def one(x):
        options = {"bias_XH": x["bias_T"][:, None], "grouped": False, "group_size": T, "score_scale": 0.2}
        return augmented_attention(x["q_BTHD"], x["k_BTKD"], x["v_BTKE"], local="laplace", **options)

    def several(x):
        return whole_row_attention(**x, segment_ids_BT=None, shards=shards, activation="laplace", score_scale=0.2)

    assert_alike(one, several, arguments)


def test_parts_shorter_than_a_window_are_refused(shards):
    q, k, v = normal(0, B, T, H, D), normal(1, B, T, K, D), normal(2, B, T, K, E)
    position_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    with pytest.raises(ValueError, match="parts of 12 tokens are shorter than the 16 that the next one needs"):
        options = AttentionOptions(group_size=4, local_groups=5)
        attend(AttentionArrays(q, k, v), options, shards=shards, position_BT=position_BT)
