"""Attention transfer: linearized attention learns to give what the softmax attention that it replaces gives.

Every layer's attention reads what the softmax model computes up to that layer, so all layers learn at once and apart
from each other, in one forward pass for both models (Zhang et al., LoLCATs, 2024, first stage).
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lin_jax.attentions.mixing import layer_kinds
from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.layers.stack import run_layers
from lin_jax.models.structure import Structure
from lin_jax.tasks.loss import LossSums
from lin_jax.train.step import Batch, Loss, LossSettings


def transfer_loss(structure: Structure, settings: LossSettings, partition: Partition) -> Loss:
    """The squared error of the attentions' outputs, averaged over channels and linearized layers.

    `structure` keeps all parameters as they were at the start (`keeps_start`): they are the teacher, called with
    softmax attention.
    """

    def loss(trained: Any, frozen: Any, constants: Any, batch: Batch) -> LossSums:
        student = structure.model(trained, frozen, constants, partition)
        teacher = structure.model({}, frozen, constants, partition)
        segment_ids_BT = batch["segment_ids"] if settings.use_segments else None
        error_BT = attention_errors(student, teacher, batch["tokens"], segment_ids_BT, partition)
        error_BT = partition.constrain(error_BT, "batch", "tokens")
        error, weight = jnp.sum(error_BT * batch["weights"]), jnp.sum(batch["weights"])
        return LossSums(error, error, weight)

    return loss


def attention_errors(
    student: Any, teacher: Any, tokens_BT: Array, segment_ids_BT: Array | None, partition: Partition = WHOLE
) -> Float[Array, "B T"]:
    """The mean square of the difference of the two models' attentions, over channels and linearized layers."""
    config = student.config
    kinds = layer_kinds(config.attention, config.depth)
    x_BTC, *shared = teacher.begin(tokens_BT, segment_ids_BT, partition)
    pair, start = _Pair(student.layers, teacher.layers), (x_BTC, jnp.zeros(tokens_BT.shape, jnp.float32))
    _, error_BT = run_layers(pair, start, *shared, remat=config.remat, kinds=kinds, partition=partition)
    return error_BT / max(1, sum(kind != "softmax" for kind in kinds))


class _Pair(nnx.Module):
    """A student's and a teacher's layer side by side."""

    def __init__(self, student: nnx.Module, teacher: nnx.Module):
        self.student, self.teacher = student, teacher

    def __call__(self, carry: tuple[Array, Array], *arguments: Any) -> tuple[Array, Array]:
        """The teacher's next features, and the errors so far with this layer's."""
        (x_BTC, error_BT), (*shared, kind) = carry, arguments
        target_BTC = self.teacher.attend(x_BTC, *shared, "softmax")
        if kind != "softmax":
            difference_BTC = self.student.attend(x_BTC, *shared, kind) - target_BTC
            error_BT += jnp.mean(jnp.square(difference_BTC.astype(jnp.float32)), axis=-1)
        return self.teacher.feed(x_BTC + target_BTC), error_BT
