"""A mesh over tokens and heads, segments that cross its borders, and how one device is compared with several."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from lin_jax.ops.shards import Shards

B, T, H, K, D, E, P = 2, 48, 4, 2, 5, 6, 7
# Runs within a part, over a border, over whole parts, a part of padding alone, and ids that come again.
SEGMENTS = np.ones((B, T), np.int32)
SEGMENTS[0, 5:37], SEGMENTS[0, 37:40], SEGMENTS[0, 40:] = 2, 0, 1
SEGMENTS[1, :3], SEGMENTS[1, 12:], SEGMENTS[1, 24:36], SEGMENTS[1, 36:46], SEGMENTS[1, 46:] = 0, 3, 0, 4, 0


def make_shards() -> Shards:
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
