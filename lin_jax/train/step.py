"""One update of the parameters, and the loss of a batch without one."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from lin_jax.layers.partition import Partition
from lin_jax.models.structure import Structure
from lin_jax.tasks.loss import LossSums, sharded_loss
from lin_jax.train.optimizer import skipped_steps
from lin_jax.train.sharding import batch_sharding, replicated
from lin_jax.train.state import TrainState

Batch = dict[str, jax.Array]
# (trained parameters, frozen parameters, constants, batch) -> sums over its tokens
Loss = Callable[[Any, Any, Any, Batch], LossSums]


class StepMetrics(NamedTuple):
    """Scalars of one update, on the device until somebody asks."""

    loss: jax.Array  # mean over tokens of what is learned: negative log-likelihood in nats, or squared error
    gradient_norm: jax.Array
    learning_rate: jax.Array
    tokens: jax.Array  # sum of weights
    skipped: jax.Array  # steps skipped since the start
    skipped_in_a_row: jax.Array


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """How a batch becomes a loss.

    `use_segments` is False where rows are single sequences, which lets the model leave out masks. `heads_weight` is
    that of the loss of Medusa heads beside the next token's; None where they train alone.
    """

    loss_chunk: int
    z_loss: float
    use_segments: bool
    heads_weight: float | None = None


def language_model_loss(structure: Structure, settings: LossSettings, partition: Partition) -> Loss:
    """Cross-entropy of the next tokens; a batch holds tokens, targets, weights and segment ids, [B, T] each."""

    def loss(trained: Any, frozen: Any, constants: Any, batch: Batch) -> LossSums:
        model = structure.model(trained, frozen, constants, partition)
        return next_token_loss(model, features_of(model, batch, settings, partition), batch, settings, partition)

    return loss


def features_of(model: Any, batch: Batch, settings: LossSettings, partition: Partition) -> Float[Array, "B T C"]:
    """What the model's head reads of a batch."""
    segment_ids_BT = batch["segment_ids"] if settings.use_segments else None
    return partition.constrain(model.features(batch["tokens"], segment_ids_BT, partition), "batch", "tokens", None)


def next_token_loss(
    model: Any, hidden_BTC: Float[Array, "B T C"], batch: Batch, settings: LossSettings, partition: Partition
) -> LossSums:
    """Cross-entropy of the next tokens, of what `features_of` gives."""
    # The layers are no part of the head, and many.
    graph, used, layers = nnx.split(model, lambda path, _: path[0] != "layers", ...)
    return sharded_loss(
        lambda used, x: nnx.merge(graph, used, layers).head(x),
        used,
        hidden_BTC,
        batch["targets"],
        batch["weights"],
        chunk=loss_chunk(batch, settings, partition),
        z_loss=settings.z_loss,
        partition=partition,
    )


def loss_chunk(batch: Batch, settings: LossSettings, partition: Partition) -> int:
    """Tokens of a row whose logits are in memory at a time, on all devices that share it."""
    return max(1, settings.loss_chunk * partition.shards("batch", "tokens") // batch["tokens"].shape[0])


def gradient_sums(loss: Callable[[Any, Batch], LossSums], parameters: Any, batch: Batch, microbatches: int) -> Any:
    """`LossSums` of a batch and the float32 gradient of their `loss`, one microbatch at a time.

    Sums, not means, are added, so the result does not depend on `microbatches`, whatever the weights are.
    """

    def one(part: Batch) -> tuple[LossSums, Any]:
        def with_sums(parameters: Any) -> tuple[jax.Array, LossSums]:
            sums = loss(parameters, part)
            return sums.loss, sums

        gradient, sums = jax.grad(with_sums, has_aux=True)(parameters)
        return sums, gradient

    if microbatches == 1:
        return one(batch)
    parts = jax.tree.map(lambda rows: _microbatches(rows, microbatches), batch)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(one, batch))
    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None), zeros, parts)[0]


def _microbatches(rows: jax.Array, count: int) -> jax.Array:
    """[B, T] -> [count, B / count, T]; each takes every count-th row, so that no row leaves its device."""
    return rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1)


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    microbatches: int,
    shardings: TrainState,
    partition: Partition,
) -> Any:
    """A jitted (state, batch) -> (state, StepMetrics); the state that goes in is used up."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        def of_parameters(parameters: Any, part: Batch) -> LossSums:
            return loss(parameters, state.frozen, state.constants, part)

        sums, gradient = gradient_sums(of_parameters, state.parameters, batch, microbatches)
        weight = jnp.where(sums.weight > 0, sums.weight, 1.0)
        gradient = jax.lax.with_sharding_constraint(jax.tree.map(lambda g: g / weight, gradient), shardings.parameters)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        _, skipped_before = skipped_steps(state.optimizer)
        in_a_row, skipped = skipped_steps(optimizer_state)
        metrics = StepMetrics(
            loss=sums.nll / weight,
            gradient_norm=optax.tree.norm(gradient),
            learning_rate=jnp.asarray(schedule(state.step - skipped_before), jnp.float32),
            tokens=sums.weight,
            skipped=skipped,
            skipped_in_a_row=in_a_row,
        )
        return TrainState(state.step + 1, parameters, state.frozen, state.constants, optimizer_state), metrics

    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(partition)),
        out_shardings=(shardings, replicated(partition)),
        donate_argnums=0,
    )


def make_evaluation_step(loss: Loss, shardings: TrainState, partition: Partition) -> Any:
    """A jitted (parameters, frozen, constants, batch) -> LossSums."""
    return jax.jit(
        loss,
        in_shardings=(shardings.parameters, shardings.frozen, shardings.constants, batch_sharding(partition)),
        out_shardings=replicated(partition),
    )
