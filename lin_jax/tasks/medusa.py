"""Training of Medusa heads, alone (Medusa-1) or with the model (Medusa-2), and how often they are right.

Cai et al., 2024: the loss of head k weighs 0.8^k; it guesses the token k places after the next one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.decode.trees import best_paths, expected_tokens, write_tree
from lin_jax.layers.partition import Partition
from lin_jax.models.medusa import MedusaHeads
from lin_jax.models.structure import Structure
from lin_jax.settings.medusa import MedusaConfig
from lin_jax.tasks.loss import LossSums, sharded_loss, split_positions
from lin_jax.train.step import Batch, Loss, LossSettings, features_of, loss_chunk, next_token_loss

# How much less the loss of each further head weighs.
DECAY = 0.8
# Guesses of a head whose accuracy is measured, as far as trees go.
RANKS = 10
# Where a run writes the tree that suits its heads.
TREE_FILE = "tree.json"


class Ahead(NamedTuple):
    """What head k is to guess at every token, for k = 1, 2, ...; weights are 0 where there is no such token."""

    targets_KBT: Int[Array, "heads B T"]
    weights_KBT: Float[Array, "heads B T"]


class HeadSums(NamedTuple):
    """Sums over tokens in an evaluation: `nll` is of the next tokens, `loss` what is minimised."""

    loss: Float[Array, ""]
    nll: Float[Array, ""]
    weight: Float[Array, ""]
    hits_KR: Float[Array, "heads ranks"]
    targets_K: Float[Array, " heads"]


def medusa_loss(structure: Structure, settings: LossSettings, partition: Partition) -> Loss:
    """The sum over heads of 0.8^k times the cross-entropy; beside the model's own where `settings` says so.

    The features are computed once for all heads. Sums are over tokens of the batch: those whose target lies behind the
    end of a row or of a document add nothing.
    """

    def loss(trained: Any, frozen: Any, constants: Any, batch: Batch) -> LossSums:
        model = structure.model(trained, frozen, constants, partition)
        hidden_BTC = features_of(model, batch, settings, partition)
        of_heads = _heads_loss(model.medusa, hidden_BTC, batch, settings, partition)
        if settings.heads_weight is None:
            return LossSums(of_heads, of_heads, jnp.sum(batch["weights"]))
        own = next_token_loss(model, hidden_BTC, batch, settings, partition)
        added = settings.heads_weight * of_heads
        return LossSums(own.loss + added, own.nll + added, own.weight)

    return loss


def medusa_evaluation(structure: Structure, settings: LossSettings, partition: Partition) -> Any:
    """(trained, frozen, constants, batch) -> `HeadSums`."""

    def evaluate(trained: Any, frozen: Any, constants: Any, batch: Batch) -> HeadSums:
        model = structure.model(trained, frozen, constants, partition)
        hidden_BTC = features_of(model, batch, settings, partition)
        own = next_token_loss(model, hidden_BTC, batch, settings, partition)
        of_heads = _heads_loss(model.medusa, hidden_BTC, batch, settings, partition)
        loss = of_heads if settings.heads_weight is None else own.nll + settings.heads_weight * of_heads
        ahead = look_ahead(batch, model.medusa.config.heads, settings.use_segments)
        hits_KR = _hits(model.medusa, hidden_BTC, ahead, loss_chunk(batch, settings, partition), partition)
        return HeadSums(loss, own.nll, own.weight, hits_KR, jnp.sum(ahead.weights_KBT, axis=(1, 2)))

    return evaluate


def look_ahead(batch: Batch, heads: int, use_segments: bool) -> Ahead:
    """The targets of all heads: those of the next token, 1, 2, ... places further on in the same document."""
    B, T = batch["targets"].shape
    shift = lambda x, k: jnp.pad(x[:, k:], ((0, 0), (0, min(k, T))))  # noqa: E731
    weights = [shift(batch["weights"], k) for k in range(1, heads + 1)]
    if use_segments:
        ids_BT = batch["segment_ids"]
        weights = [w * (shift(ids_BT, k) == ids_BT) for k, w in enumerate(weights, start=1)]
    return Ahead(jnp.stack([shift(batch["targets"], k) for k in range(1, heads + 1)]), jnp.stack(weights))


def _heads_loss(
    heads: MedusaHeads, hidden_BTC: Array, batch: Batch, settings: LossSettings, partition: Partition
) -> Float[Array, ""]:
    """The weighted sum of the heads' summed losses, one head at a time."""
    graph, arrays = nnx.split(heads.heads)
    chunk = loss_chunk(batch, settings, partition)
    factor_K = DECAY ** jnp.arange(1, heads.config.heads + 1, dtype=jnp.float32)

    def add(total: Array, part: Any) -> tuple[Array, None]:
        arrays, factor, ahead = part
        sums = sharded_loss(
            lambda arrays, x: nnx.merge(graph, arrays)(x), arrays, hidden_BTC, *ahead, chunk=chunk, partition=partition
        )
        return total + factor * sums.nll, None

    ahead = look_ahead(batch, heads.config.heads, settings.use_segments)
    return jax.lax.scan(add, jnp.zeros(()), (arrays, factor_K, ahead))[0]


def _hits(
    heads: MedusaHeads, hidden_BTC: Array, ahead: Ahead, chunk: int, partition: Partition
) -> Float[Array, "heads ranks"]:
    """How often the guess of each rank of each head is right."""
    graph, arrays = nnx.split(heads.heads)
    ranks = min(RANKS, heads.vocabulary_size)

    def of_head(_: None, part: Any) -> tuple[None, Array]:
        arrays, (targets_BT, weights_BT) = part
        head = nnx.merge(graph, arrays)

        def add(hits_R: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
            hidden, targets, weights = part
            _, best = jax.lax.top_k(head(hidden), ranks)
            right = (best == targets[..., None]) * weights[..., None]
            return hits_R + jnp.sum(right, axis=(0, 1)), None

        shards, arrays = partition.shards("tokens"), (hidden_BTC, targets_BT, weights_BT)
        parts = tuple(split_positions(array, chunk, shards) for array in arrays)
        return None, jax.lax.scan(add, jnp.zeros(ranks), parts)[0]

    return jax.lax.scan(of_head, None, (arrays, ahead))[1]


def head_values(sums: Sequence[HeadSums]) -> dict[str, float]:
    """What an evaluation tells of heads: `objective`, and `head_K_top_R`, how often one of R guesses is right."""
    total = {name: np.sum([getattr(s, name) for s in sums], axis=0, dtype=np.float64) for name in HeadSums._fields}
    values = {"objective": float(total["loss"] / total["weight"])}
    reached_KR = np.cumsum(total["hits_KR"] / np.maximum(total["targets_K"], 1)[:, None], axis=1)
    for (head, rank), value in np.ndenumerate(reached_KR):
        values[f"head_{head + 1}_top_{rank + 1}"] = float(value)
    return values


def accuracy_by_rank(values: Mapping[str, float]) -> list[list[float]]:
    """Row k, column r: how often the guess of rank r of head k is right, of what `head_values` gives."""
    table: list[list[float]] = []
    while f"head_{len(table) + 1}_top_1" in values:
        names = (f"head_{len(table) + 1}_top_{rank}" for rank in range(1, RANKS + 1))
        table.append(np.diff([values[name] for name in names if name in values], prepend=0.0).tolist())
    return table


def describe_heads(values: Mapping[str, float]) -> str:
    """One line for `head_values`."""
    table = accuracy_by_rank(values)
    first, all_ranks = (" ".join(f"{sum(row[:ranks]):.3f}" for row in table) for ranks in (1, RANKS))
    return f"heads right {first}, within {len(table[0])} guesses {all_ranks}"


def write_best_tree(workdir: Path, config: MedusaConfig, values: Mapping[str, float]) -> str:
    """Write the tree for the measured accuracies to `workdir`; returns a line about it."""
    accuracy, file = accuracy_by_rank(values), workdir / TREE_FILE
    paths = best_paths(accuracy, config.tree_nodes)
    write_tree(file, paths, accuracy)
    return f"{file}: a tree of {len(paths) + 1} nodes, {expected_tokens(accuracy, paths):.2f} tokens a step expected"
