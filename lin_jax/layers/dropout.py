"""Dropout, in training only: parts of features are set to 0, and the others grow (Srivastava et al., 2014).

What is dropped depends on a key alone, and not on how arrays are cut over devices. Models take it as `dropout_key`, and
drop nothing without one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lin_jax.settings.base import require

DROPOUT_DOC = (
    "part of the embedded tokens and of what layers add that is set to 0 in training; attention's weights are left as "
    "they are, as linear attention has none"
)


def check_dropout(rate: float) -> None:
    """Raise `ConfigError` for a `dropout` that is no part."""
    require(0 <= rate < 1, f"dropout must lie in [0, 1), but is {rate}")


def dropout(x: Float[Array, "*axes"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*axes"]:
    """Return x with a part `rate` of its numbers set to 0, the others divided by 1 - rate; without a key x itself."""
    if key is None or not rate:
        return x
    keeps = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keeps, x / (1 - rate), 0).astype(x.dtype)


def split_key(key: Key[Array, ""] | None, count: int) -> list[Key[Array, ""] | None]:
    """Return so many keys, or Nones for none."""
    return [None] * count if key is None else list(jax.random.split(key, count))
