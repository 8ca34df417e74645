"""Cross-entropy of a large vocabulary, a chunk of positions at a time."""

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lin_jax.layers.partition import Partition

# How an array lies; inside `jax.shard_map` without the mesh.
Cut = NamedSharding | PartitionSpec


class LossSums(NamedTuple):
    """Sums over tokens, so that parts of a batch add up exactly."""

    loss: Float[Array, ""]  # weighted negative log-likelihood plus z-loss: what is minimised
    nll: Float[Array, ""]  # weighted negative log-likelihood, in nats
    weight: Float[Array, ""]  # weights


def token_losses(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], cut: Cut | None = None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Negative log-likelihood of each target in nats, and the log of the softmax denominator.

    `cut` says how the vocabulary is cut, if it is.
    """
    if cut is not None:
        logits_BTV = jax.lax.with_sharding_constraint(logits_BTV, cut)
    denominator_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    if cut is None:
        chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
        return denominator_BT - chosen_BT, denominator_BT
    # A look-up would gather the logits; a sum adds up what the parts of the vocabulary have.
    is_target_BTV = jnp.arange(logits_BTV.shape[-1], dtype=targets_BT.dtype)[None, None] == targets_BT[..., None]
    return denominator_BT - jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0), axis=-1), denominator_BT


def sharded_loss(
    head: Callable[[Any, Array], Array],
    parameters: Any,
    hidden_BTC: Float[Array, "B T C"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    chunk: int,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    partition: Partition,
) -> LossSums:
    """`chunked_loss` where rows and tokens may be cut over devices.

    Each device goes through its own chunks; losses, and the gradient of the head, are added up over devices once, after
    the last chunk. Along the vocabulary the compiler cuts the products.

    Args:
        head: parameters and hidden states [B, t, C] -> float32 logits [B, t, V].
        parameters: a tree of arrays, whole but for the vocabulary.
        hidden_BTC: see `chunked_loss`, as the other arguments.
        targets_BT: the next tokens.
        weights_BT: of every target.
        chunk: tokens of a whole row whose logits exist at a time, on all devices together.
        z_loss: weight of the squared log of the softmax denominator.
        smoothing: see `chunked_loss`.
        partition: how batch and vocabulary are cut.
    """
    axes = partition.axes("batch") + partition.axes("tokens")
    size = jax.eval_shape(head, parameters, hidden_BTC[:, :1]).shape[-1]
    (vocabulary,) = partition.spec(("vocabulary",), (size,))
    extra: dict[str, Any] = {"z_loss": z_loss, "smoothing": smoothing}
    if not axes:
        of_head, cut = (
            functools.partial(head, parameters),
            partition.place(None, None, vocabulary) if vocabulary else None,
        )
        return chunked_loss(of_head, hidden_BTC, targets_BT, weights_BT, chunk=chunk, cut=cut, **extra)
    rows = PartitionSpec(partition.axes("batch") or None, partition.axes("tokens") or None)
    own = max(1, chunk // partition.shards("tokens"))

    def of_part(parameters: Any, *part: Array) -> LossSums:
        cut = PartitionSpec(None, None, vocabulary) if vocabulary else None
        sums = chunked_loss(functools.partial(head, parameters), *part, chunk=own, cut=cut, **extra)
        return jax.tree.map(lambda array: jax.lax.psum(array, axes), sums)

    sharded = jax.shard_map(
        of_part,
        mesh=partition.mesh,
        in_specs=(PartitionSpec(), rows, rows, rows),
        out_specs=PartitionSpec(),
        axis_names=set(axes),
        check_vma=False,
    )
    return sharded(parameters, hidden_BTC, targets_BT, weights_BT)


def head_of(model: Any, others: Collection[str] = ()) -> tuple[Callable[[Any, Array], Array], Any]:
    """Return what makes logits of parameters and features, and its parameters.

    Layers are no part of it, and many; nor is what `others` names, such as teachers.
    """
    apart = {"layers", "encoder_layers", *others}
    graph, used, unused = nnx.split(model, lambda path, _: path[0] not in apart, ...)

    def head(used: Any, x: Array) -> Array:
        merged: Any = nnx.merge(graph, used, unused)
        return merged.head(x)

    return head, used


def chunked_loss(
    head: Callable[[Array], Array],
    hidden_BTC: Float[Array, "B T C"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    chunk: int,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    cut: Cut | None = None,
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
        smoothing: part of the loss that is the mean over all tokens of the vocabulary instead of the target's (Szegedy
            et al., 2016); `nll` has none of it.
        cut: how logits are cut along the vocabulary.
    """

    @jax.checkpoint
    def add(sums: LossSums, part: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
        hidden, targets, weights = part
        logits = head(hidden)
        nll, denominator = token_losses(logits, targets, cut)
        nll_sum = jnp.sum(nll * weights)
        more = z_loss * jnp.sum(jnp.square(denominator) * weights)
        if smoothing:
            more += smoothing * jnp.sum((denominator - jnp.mean(logits, axis=-1) - nll) * weights)
        return LossSums(sums.loss + nll_sum + more, sums.nll + nll_sum, sums.weight + jnp.sum(weights)), None

    parts = tuple(split_positions(array, chunk) for array in (hidden_BTC, targets_BT, weights_BT))
    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, LossSums(zero, zero, zero), parts)[0]


def split_positions(array: Array, chunk: int, shards: int = 1) -> Array:
    """[B, T, ...] -> [parts, B, t, ...] with t at most `chunk`; the end is filled with zeros, which weigh nothing.

    Rows that are cut over `shards` devices are split on each device, so that every part has some tokens of all.
    """
    batch, length, *rest = array.shape
    length //= shards
    parts = -(-length // max(1, chunk // shards))
    size = -(-length // parts)
    padding = [(0, 0), (0, 0), (0, parts * size - length)] + [(0, 0)] * len(rest)
    padded = jnp.pad(array.reshape(batch, shards, length, *rest), padding)
    split = jnp.moveaxis(padded.reshape(batch, shards, parts, size, *rest), 2, 0)
    return split.reshape(parts, batch, shards * size, *rest)
