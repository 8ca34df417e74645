"""Floating point operations of a model, counted from its config."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from lin_jax.layers.parameter import Path, Role, roles_by_path
from lin_jax.models.base import Matrix, Model, ModelConfig
from lin_jax.models.registry import MODELS, create_model
from lin_jax.settings.finetune import LoraConfig


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of matrix products for one token of a training step.

    A multiplication and an addition are two operations. Masked halves of triangular products count, as they are
    computed; embedding look-ups and element-wise work do not.

    Attributes:
        forward: of what is learned from.
        backward: gradients of inputs behind which something trains, and of matrices that train.
        recomputed: what the backward pass computes once more because it was not kept.
    """

    forward: int
    backward: int
    recomputed: int

    @property
    def needed(self) -> int:
        """Forward and backward, nothing recomputed: what MFU counts."""
        return self.forward + self.backward

    @property
    def computed(self) -> int:
        """All operations."""
        return self.needed + self.recomputed

    def __add__(self, other: "Flops") -> "Flops":
        """Both."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Flops(*(mine + theirs for mine, theirs in pairs))

    def __rmul__(self, count: int) -> "Flops":
        """Those of so many."""
        return Flops(*(count * own for own in dataclasses.astuple(self)))

    def __floordiv__(self, count: int) -> "Flops":
        """Those of one of so many."""
        return Flops(*(own // count for own in dataclasses.astuple(self)))


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Operations for one token where everything trains, nothing recomputed: three times the forward pass."""
    return float(training_flops(config, sequence_length).needed)


def training_flops(
    config: ModelConfig,
    sequence_length: int,
    lora: LoraConfig | None = None,
    trains: Callable[[Path], bool] = lambda path: True,
    *,
    tiled: bool = False,
) -> Flops:
    """Return the operations for one token of a training step that learns to predict the next token.

    Args:
        config: the model.
        sequence_length: tokens in a row.
        lora: adapters; None: there are none.
        trains: whether the parameter at a path trains.
        tiled: whether softmax attention leaves out the masked half of its scores.
    """
    lora = lora or LoraConfig()
    layers = layer_flops(config, sequence_length, lora, trains, tiled=tiled)
    return layers + head_flops(config, trains, reaches_layers(config, lora, trains))


def reaches_layers(config: ModelConfig, lora: LoraConfig, trains: Callable[[Path], bool]) -> bool:
    """Return whether gradients go back into the layers: something trains in them or before them."""
    before_head = (path for path, roles in roles_of(config).items() if "head" not in roles and path[0] != "norm")
    return bool(lora.rank) or any(map(trains, before_head))


@functools.cache
def roles_of(config: ModelConfig) -> dict[Path, tuple[Role, ...]]:
    """Return what each parameter of a model is for, by path; no parameter is made."""
    return roles_by_path(nnx.eval_shape(lambda: create_model(config, nnx.Rngs(0))))


def layer_flops(config: ModelConfig, T: int, lora: LoraConfig, trains: Callable[[Path], bool], *, tiled: bool) -> Flops:
    """Return the operations of all layers; see `training_flops`.

    They are one scan, whose backward pass is the same for all: none, or through every input.
    """
    model = _model(config)
    mixing, own = model.attention_flops(config, T, tiled=tiled), model.matrices(config)
    return _stack_flops(config, own, mixing, model.recomputed_flops(config, T), lora, trains)


def pair_flops(config: ModelConfig, S: int, T: int, lora: LoraConfig, trains: Callable[[Path], bool]) -> Flops:
    """Return the operations of all layers of a model that reads a source, for both rows of a pair.

    Args:
        config: the model.
        S: tokens of the source.
        T: tokens of the target.
        lora: adapters.
        trains: whether the parameter at a path trains.
    """
    model: Any = _model(config)
    mixing, of_source = model.pair_attention_flops(config, S, T)
    target = _stack_flops(config, model.matrices(config), mixing, 0, lora, trains)
    return T * target + S * _stack_flops(config, model.source_matrices(config), of_source, 0, lora, trains)


def _stack_flops(
    config: ModelConfig,
    own: Sequence[Matrix],
    mixing: int,
    recomputed: int,
    lora: LoraConfig,
    trains: Callable[[Path], bool],
) -> Flops:
    """Return the operations of matrices and of attention, of which `recomputed` are repeated anyway."""
    forward = sum(matrix.flops for matrix in own) + mixing
    adapters = adapter_flops(own, lora)
    if not reaches_layers(config, lora, trains):
        return Flops(forward, 0, 0)
    # Nothing reads the last product of a layer again: it ends in a sum.
    again = {"none": 0, "full": forward + adapters - own[-1].flops, "dots": mixing}
    backward = forward + mixing + sum(matrix.flops for matrix in own if trains(matrix.path)) + 2 * adapters
    return Flops(forward + adapters, backward, again[config.remat] + recomputed)


def adapter_flops(own: Sequence[Matrix], lora: LoraConfig) -> int:
    """Return the forward operations of the adapters of some matrices."""
    targets = [matrix for matrix in own if matrix.path[-2] in lora.targets]
    return sum(2 * lora.rank * (m.inputs + m.outputs) * m.layers for m in targets)


def head_flops(config: ModelConfig, trains: Callable[[Path], bool], reached: bool) -> Flops:
    """Return the operations of the head; `reached`: whether gradients go on into the layers.

    Logits are never kept: the backward pass computes them again.
    """
    path = _model(config).head_path(config)
    forward = 2 * config.width * config.vocabulary_size
    times = (reached or trains(("norm", "weight"))) + trains(path)
    return Flops(forward, times * forward, forward if times else 0)


def _model(config: ModelConfig) -> type[Model]:
    return MODELS[config.architecture]
