"""Rotary positions with every scaling."""

import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.experiment import RopeConfig
from lin_jax.layers.rope import rotation


def expected_angles(rope, head_size, positions, length):
    """Hugging Face's rules, one frequency at a time."""
    theta, angles = rope.theta, np.zeros((length, head_size // 2))
    if rope.scaling == "dynamic" and length > positions:
        theta *= (rope.factor * length / positions - (rope.factor - 1)) ** (head_size / (head_size - 2))
    for index in range(head_size // 2):
        frequency = theta ** (-2 * index / head_size)
        wavelength = 2 * np.pi / frequency
        if rope.scaling == "linear":
            frequency /= rope.factor
        if rope.scaling == "llama3" and wavelength > rope.original_positions / rope.low_frequency_factor:
            frequency /= rope.factor
        elif rope.scaling == "llama3" and wavelength >= rope.original_positions / rope.high_frequency_factor:
            low, high = rope.low_frequency_factor, rope.high_frequency_factor
            smooth = (rope.original_positions / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / rope.factor + smooth * frequency
        angles[:, index] = frequency * np.arange(length)
    return angles


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(theta=500.0),
        RopeConfig(scaling="linear", factor=4.0),
        RopeConfig(scaling="dynamic", factor=2.0),
        RopeConfig(scaling="llama3", factor=8.0, original_positions=64, theta=1000.0),
    ],
    ids=lambda rope: rope.scaling,
)
@pytest.mark.parametrize("length", [20, 50])
def test_rotary_scaling(rope, length):
    position = jnp.concatenate([jnp.arange(length), jnp.arange(7)])[None]
    turn = rotation(rope, position, 16, 32)
    for part, expected in ((turn.cos_BTD, np.cos), (turn.sin_BTD, np.sin)):
        np.testing.assert_allclose(part[0, :length], expected(expected_angles(rope, 16, 32, length)), atol=2e-5)
        # A short document beside a long one keeps its own scaling.
        np.testing.assert_allclose(part[0, length:], expected(expected_angles(rope, 16, 32, 7)), atol=2e-5)
