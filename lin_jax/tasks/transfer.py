"""Attention transfer: linearized attention learns to give what the softmax attention that it replaces gives.

Every layer's attention reads what the softmax model computes up to that layer, so all layers learn at once and apart
from each other, in one forward pass for both models (Zhang et al., LoLCATs, 2024, first stage).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lin_jax.attentions.registry import with_kind
from lin_jax.layers.parameter import Path
from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.layers.stack import run_layers
from lin_jax.models.base import ResidualLayer
from lin_jax.models.flops import Flops, adapter_flops
from lin_jax.models.registry import MODELS
from lin_jax.models.structure import Structure
from lin_jax.settings.base import require, setting
from lin_jax.settings.finetune import FinetuneConfig
from lin_jax.tasks.base import Batch, Loss
from lin_jax.tasks.language_model import LanguageModelling
from lin_jax.tasks.loss import LossSums


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferFinetuneConfig(FinetuneConfig):
    """Attention transfer: linearized layers learn to give what the softmax attention that they replace gives.

    That goes on to the next layer; the loss is the mean squared error.
    """

    objective: Literal["attention_transfer"] = setting("attention_transfer", "what is learned")


class AttentionTransfer(LanguageModelling):
    """The squared error of the attentions' outputs, averaged over channels and linearized layers.

    The parameters as they were at the start are the teacher, called with softmax attention. Measured as a language
    model.
    """

    settings = TransferFinetuneConfig
    keeps_start = True
    needs_base = True

    def check(self) -> None:
        """Raise `ConfigError` for models that have no linearized attention, or where more than attention trains."""
        super().check()
        model, train = self.config.model, self.config.finetune.train
        require(
            MODELS[model.architecture].has_softmax_form and model.attention.kind != "softmax",
            "finetune.objective=attention_transfer is for linearized LLaMA and GPT-2, not for "
            f"{model.architecture} with model.attention.kind={model.attention.kind}",
        )
        require(
            set(train) <= {"new", "attention"},
            f"finetune.train={','.join(train)} does not suit objective=attention_transfer, in which only attention "
            "learns: give new, attention or both",
        )

    def loss(self, structure: Structure, partition: Partition) -> Loss:
        """Return the squared error; `structure` keeps the start."""

        def loss(trained: Any, frozen: Any, constants: Any, batch: Batch, key: Array | None) -> LossSums:
            student = structure.model(trained, frozen, constants, partition)
            teacher = structure.model({}, frozen, constants, partition)
            error_BT = attention_errors(student, teacher, batch["tokens"], self.segment_ids(batch), partition)
            error_BT = partition.constrain(error_BT, "batch", "tokens")
            error, weight = jnp.sum(error_BT * batch["weights"]), jnp.sum(batch["weights"])
            return LossSums(error, error, weight)

        return loss

    def flops(self, trains: Callable[[Path], bool], *, tiled: bool) -> Flops:
        """Return the teacher's forward pass, and every linearized attention, whose gradients end at its inputs."""
        model, T = self.config.model, self.config.data.sequence_length
        kind = MODELS[model.architecture]
        own = kind.matrices(model)
        projections = [m for m in own if m.path[-2] not in ("gate", "up", "down")]
        adapters = adapter_flops(projections, self.config.finetune.lora)
        mixing = kind.attention_flops(model, T, tiled=tiled)
        teacher = sum(m.flops for m in own) + kind.attention_flops(_all_softmax(model), T, tiled=tiled)
        student = sum(m.flops for m in projections) + mixing + adapters
        output = sum(m.flops for m in projections if m.path[-2] == "output")
        learned = sum(m.flops for m in projections if trains(m.path))
        backward = output + learned + 2 * adapters + 2 * mixing
        again = {"none": 0, "full": teacher + student, "dots": mixing}[model.remat]
        return Flops(teacher + student, backward, again + kind.recomputed_flops(model, T))


def attention_errors(
    student: Any, teacher: Any, tokens_BT: Array, segment_ids_BT: Array | None, partition: Partition = WHOLE
) -> Float[Array, "B T"]:
    """Return the mean square of the difference of two models' attentions, over channels and linearized layers."""
    config = student.config
    kinds = config.attention.kinds(config.depth)
    x_BTC, *shared = teacher.begin(tokens_BT, segment_ids_BT, partition)
    pair, start = _Pair(student.layers, teacher.layers), (x_BTC, jnp.zeros(tokens_BT.shape, jnp.float32))
    _, error_BT = run_layers(pair, start, *shared, remat=config.remat, kinds=kinds, partition=partition)
    return error_BT / max(1, sum(kind != "softmax" for kind in kinds))


class _Pair(nnx.Module):
    """A student's and a teacher's layer side by side."""

    def __init__(self, student: ResidualLayer, teacher: ResidualLayer, learns: bool = True):
        self.student, self.teacher, self.learns = student, teacher, learns

    def of_kind(self, kind: str) -> "_Pair":
        """Return the pair for a layer of this kind; one that keeps softmax attention has nothing to learn."""
        return _Pair(self.student.of_kind(kind), self.teacher.of_kind("softmax"), kind != "softmax")

    def __call__(self, carry: tuple[Array, Array], *shared: Any) -> tuple[Array, Array]:
        """Return the teacher's next features, and the errors so far with this layer's."""
        x_BTC, error_BT = carry
        target_BTC = self.teacher.attend(x_BTC, *shared)
        if self.learns:
            difference_BTC = self.student.attend(x_BTC, *shared) - target_BTC
            error_BT += jnp.mean(jnp.square(difference_BTC.astype(jnp.float32)), axis=-1)
        return self.teacher.feed(x_BTC + target_BTC), error_BT


def _all_softmax(config: Any) -> Any:
    return dataclasses.replace(config, attention=with_kind(config.attention, "softmax"))
