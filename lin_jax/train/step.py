"""One update of the parameters, and the loss of a batch without one."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from lin_jax.layers.partition import Partition
from lin_jax.tasks.base import Batch, Evaluation, Loss
from lin_jax.tasks.loss import LossSums
from lin_jax.train.optimizer import skipped_steps
from lin_jax.train.sharding import replicated
from lin_jax.train.state import TrainState


class StepMetrics(NamedTuple):
    """Scalars of one update, on the device until somebody asks."""

    loss: jax.Array  # mean over tokens of what is learned: negative log-likelihood in nats, or squared error
    gradient_norm: jax.Array
    learning_rate: jax.Array
    tokens: jax.Array  # sum of weights, whatever `Task.unit` they count
    skipped: jax.Array  # steps skipped since the start
    skipped_in_a_row: jax.Array
    real_tokens: jax.Array | None = None  # see `Task.real_tokens`
    computed_tokens: jax.Array | None = None


def gradient_sums(
    loss: Callable[[Any, Batch, jax.Array | None], LossSums],
    parameters: Any,
    batch: Batch,
    microbatches: int,
    key: jax.Array | None = None,
) -> Any:
    """Return `LossSums` of a batch and the float32 gradient of their `loss`, one microbatch at a time.

    Sums, not means, are added, so the result does not depend on `microbatches`, whatever the weights are. With a `key`,
    of dropout, it does: each microbatch has one of its own.
    """

    def one(part: Batch, number: jax.Array | int) -> tuple[LossSums, Any]:
        own = None if key is None else jax.random.fold_in(key, number)

        def with_sums(parameters: Any) -> tuple[jax.Array, LossSums]:
            sums = loss(parameters, part, own)
            return sums.loss, sums

        gradient, sums = jax.grad(with_sums, has_aux=True)(parameters)
        return sums, gradient

    if microbatches == 1:
        return one(batch, 0)
    parts = jax.tree.map(lambda rows: _microbatches(rows, microbatches), batch)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(one, batch, 0))
    numbered = parts, jnp.arange(microbatches)
    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, one(*part)), None), zeros, numbered)[0]


def _microbatches(rows: jax.Array, count: int) -> jax.Array:
    """[B, T] -> [count, B / count, T]; each takes every count-th row, so that no row leaves its device."""
    return rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1)


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    microbatches: int,
    shardings: TrainState,
    of_batch: Mapping[str, NamedSharding],
    partition: Partition,
    dropout_seed: int | None = None,
    real_tokens: Callable[[Batch], tuple[jax.Array, int] | None] = lambda batch: None,
) -> Any:
    """Return a jitted (state, batch) -> (state, StepMetrics); the state that goes in is used up.

    `dropout_seed` and the number of the step decide what is dropped; None: nothing is. `real_tokens` is the task's.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        def of_parameters(parameters: Any, part: Batch, key: jax.Array | None) -> LossSums:
            return loss(parameters, state.frozen, state.constants, part, key)

        key = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), state.step)
        sums, gradient = gradient_sums(of_parameters, state.parameters, batch, microbatches, key)
        weight = jnp.where(sums.weight > 0, sums.weight, 1.0)
        gradient = jax.lax.with_sharding_constraint(jax.tree.map(lambda g: g / weight, gradient), shardings.parameters)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        _, skipped_before = skipped_steps(state.optimizer)
        in_a_row, skipped = skipped_steps(optimizer_state)
        counted = real_tokens(batch)
        metrics = StepMetrics(
            loss=sums.nll / weight,
            gradient_norm=optax.tree.norm(gradient),
            learning_rate=jnp.asarray(schedule(state.step - skipped_before), jnp.float32),
            tokens=sums.weight,
            skipped=skipped,
            skipped_in_a_row=in_a_row,
            real_tokens=None if counted is None else counted[0],
            computed_tokens=None if counted is None else jnp.asarray(counted[1], jnp.int32),
        )
        return TrainState(state.step + 1, parameters, state.frozen, state.constants, optimizer_state), metrics

    return jax.jit(
        step,
        in_shardings=(shardings, dict(of_batch)),
        out_shardings=(shardings, replicated(partition)),
        donate_argnums=0,
    )


def make_evaluation_step(
    evaluate: Evaluation, shardings: TrainState, of_batch: Mapping[str, NamedSharding], partition: Partition
) -> Any:
    """Return a jitted (parameters, frozen, constants, batch) -> sums."""
    return jax.jit(
        evaluate,
        in_shardings=(shardings.parameters, shardings.frozen, shardings.constants, dict(of_batch)),
        out_shardings=replicated(partition),
    )
