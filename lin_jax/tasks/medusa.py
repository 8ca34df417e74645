"""Training of Medusa heads, alone (Medusa-1) or with the model (Medusa-2), and how often they are right.

Cai et al., 2024: the loss of head k weighs 0.8^k; it guesses the token k places after the next one.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.data.tokenizers import Tokenizer
from lin_jax.decode.trees import best_paths, expected_tokens, tree_to_json
from lin_jax.layers.parameter import Path
from lin_jax.layers.partition import Partition
from lin_jax.models.flops import Flops, head_flops, layer_flops, reaches_layers
from lin_jax.models.medusa import HEADS, MedusaHeads, first_kernel
from lin_jax.models.structure import Structure
from lin_jax.settings.base import section, setting
from lin_jax.settings.finetune import FinetuneConfig
from lin_jax.settings.medusa import MedusaConfig
from lin_jax.tasks.base import Batch, Evaluation, Loss, ResultFile, Validation
from lin_jax.tasks.language_model import LanguageModelling
from lin_jax.tasks.loss import LossSums, sharded_loss, split_positions

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MedusaFinetuneConfig(FinetuneConfig):
    """Medusa heads, which guess the tokens after the next one, alone or with what else trains.

    Alone (`train` is empty) it is Medusa-1, else Medusa-2.
    """

    objective: Literal["medusa"] = setting("medusa", "what is learned")
    medusa: MedusaConfig = section(MedusaConfig, "the heads")


class MedusaTraining(LanguageModelling):
    """The sum over heads of 0.8^k times the cross-entropy; beside the model's own where the model trains too.

    The features are computed once for all heads. Sums are over tokens of the batch: those whose target lies behind the
    end of a row or of a document add nothing.
    """

    settings = MedusaFinetuneConfig
    best_by = "objective"
    adds = (HEADS,)
    keeps_attention = True
    needs_base = True
    free_settings = ("finetune.medusa.tree_nodes",)

    @property
    def heads(self) -> MedusaConfig:
        """The settings of the heads."""
        finetune = self.config.finetune
        assert isinstance(finetune, MedusaFinetuneConfig)
        return finetune.medusa

    def extend(self, model: Any, rngs: nnx.Rngs) -> None:
        """Add the heads."""
        shape = (self.config.model.width, self.config.model.vocabulary_size)
        model.medusa = MedusaHeads(self.heads, *shape, rngs=rngs)

    def start(self, model: Any, known: Iterable[str]) -> None:
        """Let new heads compute what the model's own head does."""
        if not any(name.startswith(f"{HEADS}.") for name in known):
            kernel = model.medusa.heads.logits.kernel
            kernel.set_value(jnp.broadcast_to(first_kernel(model), kernel.get_value().shape))

    def loss(self, structure: Structure, partition: Partition) -> Loss:
        """Return the loss of the heads, and of the model where it trains with them."""
        z_loss = self.config.optimizer.z_loss

        def loss(trained: Any, frozen: Any, constants: Any, batch: Batch, key: Array | None) -> LossSums:
            model = structure.model(trained, frozen, constants, partition)
            features_BTC = self.features(model, batch, partition, key)
            of_heads = self._heads_loss(model.medusa, features_BTC, batch, partition)
            if not self.config.finetune.trains_model:
                return LossSums(of_heads, of_heads, jnp.sum(batch["weights"]))
            own = self.next_token_loss(model, features_BTC, batch, partition, z_loss=z_loss)
            added = self.heads.weight * of_heads
            return LossSums(own.loss + added, own.nll + added, own.weight)

        return loss

    def evaluation(self, structure: Structure, partition: Partition) -> Evaluation:
        """Return the function that gives `HeadSums`."""

        def evaluate(trained: Any, frozen: Any, constants: Any, batch: Batch) -> HeadSums:
            model = structure.model(trained, frozen, constants, partition)
            features_BTC = self.features(model, batch, partition)
            own = self.next_token_loss(model, features_BTC, batch, partition, z_loss=0.0)
            of_heads = self._heads_loss(model.medusa, features_BTC, batch, partition)
            loss = own.nll + self.heads.weight * of_heads if self.config.finetune.trains_model else of_heads
            ahead = look_ahead(batch, model.medusa.config.heads, self.segment_ids(batch))
            hits_KR = _hits(model.medusa, features_BTC, ahead, self.loss_chunk(batch, partition), partition)
            return HeadSums(loss, own.nll, own.weight, hits_KR, jnp.sum(ahead.weights_KBT, axis=(1, 2)))

        return evaluate

    def _heads_loss(
        self, heads: MedusaHeads, features_BTC: Array, batch: Batch, partition: Partition
    ) -> Float[Array, ""]:
        """Return the weighted sum of the heads' summed losses, one head at a time."""
        graph, arrays = nnx.split(heads.heads)
        chunk = self.loss_chunk(batch, partition)
        factor_K = DECAY ** jnp.arange(1, heads.config.heads + 1, dtype=jnp.float32)

        def head(arrays: Any, x: Array) -> Array:
            return nnx.merge(graph, arrays)(x)

        def add(total: Array, part: Any) -> tuple[Array, None]:
            arrays, factor, ahead = part
            sums = sharded_loss(head, arrays, features_BTC, *ahead, chunk=chunk, partition=partition)
            return total + factor * sums.nll, None

        ahead = look_ahead(batch, heads.config.heads, self.segment_ids(batch))
        return jax.lax.scan(add, jnp.zeros(()), (arrays, factor_K, ahead))[0]

    def flops(self, trains: Callable[[Path], bool], *, tiled: bool) -> Flops:
        """Return the operations of the heads, the layers, and the model's own head where it trains with them."""
        model, finetune = self.config.model, self.config.finetune
        reached = reaches_layers(model, finetune.lora, trains)
        flops = layer_flops(model, self.config.data.sequence_length, finetune.lora, trains, tiled=tiled)
        flops += self._heads_flops(reached)
        return flops + head_flops(model, trains, reached) if finetune.trains_model else flops

    def _heads_flops(self, reached: bool) -> Flops:
        """Return the operations of the heads; what they read needs gradients only if the model trains with them."""
        model, medusa = self.config.model, self.heads
        block, logits = 2 * model.width * model.width, 2 * model.width * model.vocabulary_size
        forward = medusa.layers * block + logits
        unneeded = 0 if reached else (block if medusa.layers else logits)
        return Flops(medusa.heads * forward, medusa.heads * (2 * forward - unneeded), medusa.heads * forward)

    def values(self, sums: Any, tokenizer: Tokenizer) -> dict[str, float]:
        """Return the measures of the text, `objective`, and how often heads are right, see `head_values`."""
        return super().values(sums, tokenizer) | head_values(sums)

    def describe(self, values: Mapping[str, float]) -> str:
        """Return a line about the text and the heads."""
        table = accuracy_by_rank(values)
        first, all_ranks = (" ".join(f"{sum(row[:ranks]):.3f}" for row in table) for ranks in (1, RANKS))
        return f"{super().describe(values)}, heads right {first}, within {len(table[0])} guesses {all_ranks}"

    def results(self, values: Mapping[str, float], validation: Validation) -> Sequence[ResultFile]:
        """Return the tree for the measured accuracies."""
        accuracy = accuracy_by_rank(values)
        paths = best_paths(accuracy, self.heads.tree_nodes)
        told = f"a tree of {len(paths) + 1} nodes, {expected_tokens(accuracy, paths):.2f} tokens a step expected"
        return [ResultFile(TREE_FILE, tree_to_json(paths, accuracy), told)]


def look_ahead(batch: Batch, heads: int, segment_ids_BT: Array | None) -> Ahead:
    """Return the targets of all heads: those of the next token, 1, 2, ... places further on in the same document."""
    T = batch["targets"].shape[1]

    def shift(x_BT: Array, places: int) -> Array:
        return jnp.pad(x_BT[:, places:], ((0, 0), (0, min(places, T))))

    weights = [shift(batch["weights"], k) for k in range(1, heads + 1)]
    if segment_ids_BT is not None:
        weights = [w * (shift(segment_ids_BT, k) == segment_ids_BT) for k, w in enumerate(weights, start=1)]
    return Ahead(jnp.stack([shift(batch["targets"], k) for k in range(1, heads + 1)]), jnp.stack(weights))


def _hits(
    heads: MedusaHeads, features_BTC: Array, ahead: Ahead, chunk: int, partition: Partition
) -> Float[Array, "heads ranks"]:
    """Return how often the guess of each rank of each head is right."""
    graph, arrays = nnx.split(heads.heads)
    ranks = min(RANKS, heads.vocabulary_size)

    def of_head(_: None, part: Any) -> tuple[None, Array]:
        arrays, (targets_BT, weights_BT) = part
        head = nnx.merge(graph, arrays)

        def add(hits_R: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
            features, targets, weights = part
            _, best = jax.lax.top_k(head(features), ranks)
            right = (best == targets[..., None]) * weights[..., None]
            return hits_R + jnp.sum(right, axis=(0, 1)), None

        shards, arrays = partition.shards("tokens"), (features_BTC, targets_BT, weights_BT)
        parts = tuple(split_positions(array, chunk, shards) for array in arrays)
        return None, jax.lax.scan(add, jnp.zeros(ranks), parts)[0]

    return jax.lax.scan(of_head, None, (arrays, ahead))[1]


def head_values(sums: Any) -> dict[str, float]:
    """Return what `HeadSums` of a validation set tell of heads.

    `objective`, and `head_K_top_R`, how often one of the R likeliest guesses of head K is right.
    """
    values = {"objective": float(sums.loss / sums.weight)}
    reached_KR = np.cumsum(sums.hits_KR / np.maximum(sums.targets_K, 1)[:, None], axis=1)
    for (head, rank), value in np.ndenumerate(reached_KR):
        values[f"head_{head + 1}_top_{rank + 1}"] = float(value)
    return values


def accuracy_by_rank(values: Mapping[str, float]) -> list[list[float]]:
    """Return a table of what `head_values` gives: row k, column r is how often the guess of rank r of head k is right.

    Rows and columns are counted from 0.
    """
    table: list[list[float]] = []
    while f"head_{len(table) + 1}_top_1" in values:
        names = (f"head_{len(table) + 1}_top_{rank}" for rank in range(1, RANKS + 1))
        table.append(np.diff([values[name] for name in names if name in values], prepend=0.0).tolist())
    return table
