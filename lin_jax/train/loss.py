"""Cross-entropy of a large vocabulary, a chunk of positions at a time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LossSums(NamedTuple):
    """Sums over tokens, so that parts of a batch add up exactly."""

    loss: Float[Array, ""]  # weighted negative log-likelihood plus z-loss: what is minimised
    nll: Float[Array, ""]  # weighted negative log-likelihood, in nats
    weight: Float[Array, ""]  # weights


def token_losses(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Negative log-likelihood of each target in nats, and the log of the softmax denominator."""
    denominator_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return denominator_BT - chosen_BT, denominator_BT


def chunked_loss(
    head: Callable[[Array], Array],
    hidden_BTC: Float[Array, "B T C"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    chunk: int,
    z_loss: float = 0.0,
) -> LossSums:
    """The sums of a batch's losses; logits [B, T, V] never exist whole, neither forward nor backward.

    Args:
        head: hidden states [B, t, C] -> float32 logits [B, t, V].
        hidden_BTC: what the model computed.
        targets_BT: the next tokens.
        weights_BT: of every target; 0 leaves it out.
        chunk: tokens of a row whose logits exist at a time. Rows stay whole, so that a batch that is cut over
            devices is not moved.
        z_loss: weight of the squared log of the softmax denominator.
    """

    @jax.checkpoint
    def add(sums: LossSums, part: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
        hidden, targets, weights = part
        nll, denominator = token_losses(head(hidden), targets)
        nll_sum = jnp.sum(nll * weights)
        z_sum = z_loss * jnp.sum(jnp.square(denominator) * weights)
        return LossSums(sums.loss + nll_sum + z_sum, sums.nll + nll_sum, sums.weight + jnp.sum(weights)), None

    parts = tuple(split_positions(array, chunk) for array in (hidden_BTC, targets_BT, weights_BT))
    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, LossSums(zero, zero, zero), parts)[0]


def split_positions(array: Array, chunk: int) -> Array:
    """[B, T, ...] -> [parts, B, t, ...] with t at most `chunk`; the end is filled with zeros, which weigh nothing."""
    batch, length = array.shape[:2]
    parts = -(-length // chunk)
    size = -(-length // parts)
    padding = [(0, 0), (0, parts * size - length)] + [(0, 0)] * (array.ndim - 2)
    padded = jnp.pad(array, padding).reshape(batch, parts, size, *array.shape[2:])
    return jnp.moveaxis(padded, 1, 0)
