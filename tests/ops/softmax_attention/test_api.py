"""Softmax attention and LongLoRA's, by their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.ops.softmax_attention.api import longlora_attention, softmax_attention
from tests.ops.heads import random_heads


@pytest.mark.parametrize("length", [24, 25, 2])
def test_longlora_by_its_definition(length):
    """Token by token: which group of the row, or of the row shifted by half a group, and what came before in it."""
    q, k, v = random_heads(length)
    y = longlora_attention(q, k, v, split=3)
    G = -(-length // 3)
    for head in range(4):
        offset = 0 if head < 2 else G - (G + 1) // 2
        group = (np.arange(length) + offset) // G
        sees = (group[:, None] == group[None]) & np.tril(np.ones((length, length), bool))
        scores = np.where(sees, q[0, :, head] @ k[0, :, head // 2].T / 8**0.5, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        expected = weights / weights.sum(axis=-1, keepdims=True) @ v[0, :, head // 2]
        np.testing.assert_allclose(y[0, :, head], expected, atol=1e-5)


def test_released_longlora_sees_the_future():
    q, k, v = random_heads(24)

    def released(v):
        return longlora_attention(q, k, v, split=3, shift="released")[0, 0].sum()

    assert np.abs(jax.grad(released)(v)[0, -1]).max() > 0
    with pytest.raises(ValueError, match="multiple of 3"):
        longlora_attention(*random_heads(25), split=3, shift="released")


def test_softmax_attention_with_shared_keys():
    q, k, v = random_heads(9)
    scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, axis=2)) / 8**0.5
    scores = jnp.where(jnp.tril(jnp.ones((9, 9), bool))[None, None], scores, -jnp.inf)
    expected = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), jnp.repeat(v, 2, axis=2))
    np.testing.assert_allclose(softmax_attention(q, k, v), expected, atol=1e-5)
