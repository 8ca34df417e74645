"""Rotary positions of LLaMA: halves of a head rotated against each other, with four kinds of scaling."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lin_jax.settings.base import require, require_positive, setting
from lin_jax.settings.typed import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig(Settings):
    """Rotary positions and their scaling, with the meaning that Hugging Face gives to each."""

    theta: float = setting(10000.0, "base of the wavelengths")
    scaling: Literal["default", "linear", "dynamic", "llama3"] = setting(
        "default",
        "how positions beyond those of pretraining are reached: default: not; linear: positions are divided by "
        "factor; dynamic: theta grows with a sequence longer than `positions`; llama3: long wavelengths are divided",
    )
    factor: float = setting(1.0, "how much longer; all but default")
    low_frequency_factor: float = setting(1.0, "scaling=llama3: wavelengths above original_positions / this are scaled")
    high_frequency_factor: float = setting(4.0, "scaling=llama3: wavelengths below original_positions / this are kept")
    original_positions: int = setting(8192, "scaling=llama3: positions of pretraining")

    def _check(self) -> None:
        require_positive(self, "theta", "low_frequency_factor", "original_positions")
        require(self.factor >= 1, f"factor must be 1 or more, but is {self.factor}")
        require(
            self.high_frequency_factor > self.low_frequency_factor,
            f"high_frequency_factor must exceed low_frequency_factor={self.low_frequency_factor}, "
            f"but is {self.high_frequency_factor}",
        )


class Rotation(NamedTuple):
    """Cosines and sines of every token's angles, float32."""

    cos_BTD: Float[Array, "B T half"]
    sin_BTD: Float[Array, "B T half"]


def rotation(rope: RopeConfig, position_BT: Int[Array, "B T"], head_size: int, positions: int) -> Rotation:
    """The rotation of tokens at `position_BT`.

    With scaling=dynamic theta depends on the length of each token's own sequence, as Hugging Face's on that of the
    whole input; so what is computed for a token changes when its sequence grows beyond `positions`.

    Args:
        rope: base and scaling.
        position_BT: positions in their sequences; a position of 0 starts one.
        head_size: D.
        positions: the model's longest sequence, beyond which dynamic scaling acts.
    """
    exponent = np.arange(0, head_size, 2) / head_size
    if rope.scaling == "dynamic":
        length_BT = jnp.maximum(_sequence_lengths(position_BT), positions).astype(jnp.float32)
        growth_BT = rope.factor * length_BT / positions - (rope.factor - 1)
        theta_BT = rope.theta * growth_BT ** (head_size / (head_size - 2))
        frequency = theta_BT[:, :, None] ** -jnp.asarray(exponent, jnp.float32)[None, None]
    else:
        frequency = jnp.asarray(_frequencies(rope, exponent), jnp.float32)[None, None]
    angle = position_BT[:, :, None].astype(jnp.float32) * frequency
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def _frequencies(rope: RopeConfig, exponent: np.ndarray) -> np.ndarray:
    frequency = rope.theta**-exponent
    if rope.scaling == "linear":
        return frequency / rope.factor
    if rope.scaling == "llama3":
        low, high = rope.low_frequency_factor, rope.high_frequency_factor
        turns = rope.original_positions * frequency / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return kept * frequency + (1 - kept) * frequency / rope.factor
    return frequency


def _sequence_lengths(position_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Tokens in the sequence of each token."""
    T = position_BT.shape[1]
    index_T = jnp.arange(T, dtype=jnp.int32)[None]
    is_last_BT = jnp.pad(position_BT[:, 1:] == 0, ((0, 0), (0, 1)), constant_values=True)
    last_BT = jax.lax.cummin(jnp.where(is_last_BT, index_T, T), axis=1, reverse=True)
    return position_BT + 1 + last_BT - index_T


def rotate_halves(x_BTHD: Float[Array, "B T H D"], rotation: Rotation) -> Float[Array, "B T H D"]:
    """Channels i and i + D/2 rotated by angle i (Su et al., 2021, in Hugging Face's order of channels)."""
    cos, sin = (part[:, :, None] for part in rotation)
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHD.dtype)
