"""Memory and traffic of a training step by formula: where no compiler for the chip is at hand, or before it is asked.

Counted are the products with matrices and the attention; element-wise work is taken to be fused into them.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from lin_jax.attentions.registry import ATTENTIONS
from lin_jax.experiment import Config
from lin_jax.models.base import Matrix
from lin_jax.models.registry import MODELS
from lin_jax.ops.softmax_attention.splash import LANES
from lin_jax.ops.softmax_attention.whole_row import QUERIES
from lin_jax.plan.compiled import Traced, sizes


@dataclasses.dataclass(frozen=True)
class State:
    """Bytes of a run's state on one device, and in one copy of it.

    `layer` is of one layer's parameters as they are computed with, cut along `mesh.tensor` alone; `outside` of those
    outside the layers, whole.
    """

    trained: tuple[int, int]
    frozen: tuple[int, int]
    optimizer: tuple[int, int]
    layer: int
    outside: int

    @property
    def own(self) -> int:
        """All of it on one device."""
        return self.trained[0] + self.frozen[0] + self.optimizer[0]


def measure_state(traced: Traced) -> State:
    """The sizes of the state, from its shapes and shardings."""
    config, state = traced.parts.config, traced.state
    itemsize = np.dtype(config.model.dtype).itemsize
    abstract = traced.parts.structure.join(state.parameters, state.frozen)
    count = {top: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for top, tree in abstract.items()}
    layers = count.pop("layers") // _tensor(traced)
    return State(
        trained=sizes(state.parameters),
        frozen=sizes(state.frozen),
        optimizer=sizes(state.optimizer),
        layer=itemsize * layers // config.model.depth,
        outside=itemsize * sum(count.values()),
    )


def _tensor(traced: Traced) -> int:
    """Parts into which heads and feed-forward layers are cut."""
    return traced.parts.mesh.shape.get("tensor", 1)


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes on one device: what layers keep for the backward pass, and the most that is there beside it."""

    kept: int
    working: int

    @property
    def bytes(self) -> int:
        """Both."""
        return self.kept + self.working


def microbatch_tokens(traced: Traced) -> int:
    """Tokens of a microbatch on one device."""
    config, shards = traced.parts.config, traced.parts.partition.shards("batch", "tokens")
    return config.data.batch_size * config.data.sequence_length // (config.train.microbatches * shards)


def layer_tokens(traced: Traced) -> int:
    """Tokens that all layers together read of a microbatch, on one device."""
    config, shards = traced.parts.config, traced.parts.partition.shards("batch", "tokens")
    return config.data.batch_size * traced.parts.task.layer_tokens // (config.train.microbatches * shards)


def estimate_activations(traced: Traced, *, flash: bool) -> Activations:
    """What the forward pass leaves, and the backward pass of one layer needs beside it.

    Args:
        traced: the run.
        flash: whether softmax attention makes its scores a tile at a time, and not whole.
    """
    config, tokens = traced.parts.config, microbatch_tokens(traced)
    itemsize, read = np.dtype(config.model.dtype).itemsize, layer_tokens(traced)
    outputs = _outputs(config) // _tensor(traced)
    products = tokens * outputs * itemsize
    kept = read * itemsize * outputs * {"full": 0, "dots": 1, "none": 3}[config.model.remat]
    features = read * config.model.width * itemsize
    # Rows that are cut over devices meet their keys a chunk of queries at a time.
    at_once = tokens if traced.parts.partition.shards("tokens") == 1 else min(tokens, QUERIES)
    scores = 0 if flash else _scores(config, at_once)
    state = measure_state(traced)
    logits = 3 * min(tokens, config.train.loss_chunk) * config.model.vocabulary_size * 4
    # A layer's outputs and their gradients; the parameters of two layers; embedding and head, whole, with gradients.
    working = 3 * products + scores + 2 * state.layer + logits + 2 * state.outside
    gradients = state.trained[0] * (1 if config.train.microbatches == 1 else 2)
    return Activations(features + kept if config.finetune.trains_model else 0, working + gradients)


def _outputs(config: Config) -> int:
    """Outputs of all products of one layer for one token."""
    return config.model.width + sum(matrix.outputs for matrix in _matrices(config))


def _matrices(config: Config) -> Sequence[Matrix]:
    return MODELS[config.model.architecture].matrices(config.model)


def _scores(config: Config, queries: int) -> int:
    """Bytes of one layer's scores of whole rows and their gradient, float32; linear attention has none of this size."""
    model = config.model
    whole = any(ATTENTIONS[kind].whole_scores for kind in model.attention.kinds(model.depth))
    heads = MODELS[model.architecture].head_sizes(model).heads
    return 2 * 4 * queries * config.data.sequence_length * heads if whole else 0


def hbm_traffic(traced: Traced, *, flash: bool) -> int:
    """Bytes that a step at least moves between HBM and one chip.

    The state is read and written once, a layer's parameters are read for every pass over it, and written before if
    they have to be gathered; products read their inputs and write their outputs.
    """
    config, state, tokens = traced.parts.config, measure_state(traced), microbatch_tokens(traced)
    itemsize, depth = np.dtype(config.model.dtype).itemsize, config.model.depth
    reached = config.finetune.trains_model
    passes = {"none": 2, "dots": 2, "full": 3}[config.model.remat] if reached else 1
    gathered = 2 if traced.parts.mesh.shape.get("fsdp", 1) > 1 else 1
    parameters = passes * gathered * (depth * state.layer + state.outside)
    channels = _outputs(config) + sum(matrix.inputs for matrix in _matrices(config))
    products = (passes + reached) * depth * tokens * channels // _tensor(traced) * itemsize
    scores = 0 if flash else depth * (passes + reached) * _scores(config, tokens) // 2
    logits = 3 * tokens * config.model.vocabulary_size * 4
    gradients = 2 * state.trained[0]
    once = 2 * (state.trained[0] + state.optimizer[0]) + state.frozen[0] + gradients
    return once + config.train.microbatches * (parameters + products + scores + logits + gradients)


def softmax_is_tiled(config: Config, platform: str) -> bool:
    """Whether softmax attention is computed a tile of its scores at a time; rows that are cut over devices are not."""
    model = MODELS[config.model.architecture]
    if not model.plain_scores or config.mesh.sequence != 1:
        return False
    D = model.head_sizes(config.model).head_size
    if platform == "tpu":
        return D % LANES == 0 and config.data.sequence_length % LANES == 0
    fits = config.data.packing == "concatenate" and config.model.dtype == "bfloat16"
    return platform == "gpu" and fits and D % 8 == 0 and D <= 128
