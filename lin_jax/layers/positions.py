"""What a model is told about positions: sinusoids, rotations, relative biases, and the token shift."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lin_jax.ops.rows import delayed
from lin_jax.ops.shards import Shards


def sinusoids(position_BT: Int[Array, "B T"], width: int) -> Float[Array, "B T C"]:
    """[sin(t w), cos(t w)] with w_i = 10000^(-2 i / C), the sine half first (Vaswani et al., 2017)."""
    frequency = 10000.0 ** (-np.arange(0, width, 2) / width)
    angle = position_BT[..., None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)[None, None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def rotate(x_BTHD: Float[Array, "B T H D"], position_BT: Int[Array, "B T"], size: int) -> Float[Array, "B T H D"]:
    """Rotary embedding of the first `size` channels, in interleaved pairs (2 i, 2 i + 1), theta 10000.

    Source: Su et al., 2021; the released FLASH rotates min(32, D) channels.
    """
    frequency = 10000.0 ** (-np.arange(0, size, 2) / size)
    angle = position_BT[..., None, None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)[None, None, None]
    turned, kept = x_BTHD[..., :size].astype(jnp.float32), x_BTHD[..., size:]
    pairs = turned.reshape(*turned.shape[:-1], size // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return jnp.concatenate([pairs.reshape(turned.shape).astype(x_BTHD.dtype), kept], axis=-1)


def bias_buckets(distance: np.ndarray, buckets: int, max_distance: int, causal: bool) -> np.ndarray:
    """T5's bucket of each distance t - s: exact for small ones, logarithmic up to `max_distance` (Raffel et al., 2020).

    Causal: all buckets for t - s >= 0. Bidirectional: half of them, and the upper half for keys after the query.
    """
    bucket = np.zeros_like(distance)
    if not causal:
        buckets //= 2
        bucket += buckets * (distance < 0)
        distance = np.abs(distance)
    distance = np.maximum(distance, 0)
    exact = buckets // 2
    # In float32, as the released code: a distance on the border of two buckets then falls to the same side.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (ratio * (buckets - exact)).astype(np.int64), buckets - 1)
    return bucket + np.where(distance < exact, distance, far)


def token_shift(
    x_BTC: Float[Array, "B T C"], position_BT: Int[Array, "B T"], shards: Shards | None = None
) -> Float[Array, "B T C"]:
    """The first half of the channels delayed by one token; 0 where a sequence starts."""
    half = x_BTC.shape[-1] // 2
    before = jnp.where((position_BT > 0)[..., None], delayed(x_BTC[..., :half], shards), 0)
    return jnp.concatenate([before, x_BTC[..., half:]], axis=-1)
