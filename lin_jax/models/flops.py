"""Floating point operations of a model, counted from its config."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lin_jax.attentions.mixing import layer_kinds
from lin_jax.attentions.settings import AttentionConfig
from lin_jax.models.flash_settings import FlashConfig
from lin_jax.models.gpt2_settings import Gpt2Config
from lin_jax.models.llama_settings import LlamaConfig
from lin_jax.models.settings import ModelConfig
from lin_jax.settings.finetune import FinetuneConfig

Path = tuple[str, ...]


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


class Matrix(NamedTuple):
    """A parameter that features are multiplied with: its path in the model, its shape, in how many layers it is."""

    path: Path
    inputs: int
    outputs: int
    layers: int = 1

    @property
    def flops(self) -> int:
        """Operations for one token."""
        return 2 * self.inputs * self.outputs * self.layers


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Operations for one token where everything trains, nothing recomputed: three times the forward pass."""
    return float(training_flops(config, sequence_length).needed)


def training_flops(
    config: ModelConfig,
    sequence_length: int,
    finetune: FinetuneConfig | None = None,
    trains: Callable[[Path], bool] = lambda path: True,
    *,
    tiled: bool = False,
) -> Flops:
    """Operations for one token of a training step.

    Args:
        config: the model.
        sequence_length: tokens in a row.
        finetune: adapters, heads and the objective; None is plain training.
        trains: whether the parameter at a path trains.
        tiled: whether softmax attention leaves out the masked half of its scores.
    """
    finetune = finetune or FinetuneConfig()
    if finetune.objective == "attention_transfer":
        return _transfer_flops(config, sequence_length, finetune, trains, tiled)
    reaches_layers = bool(finetune.lora.rank) or any(map(trains, _of_layers(config)))
    flops = _layer_flops(config, sequence_length, finetune, trains, reaches_layers, tiled)
    if finetune.objective == "medusa":
        flops += _medusa_flops(config, finetune, reaches_layers)
    if finetune.objective == "language_model" or finetune.trains_model:
        flops += _head_flops(config, trains, reaches_layers)
    return flops


def _of_layers(config: ModelConfig) -> list[Path]:
    """Parameters of every group that lies in the layers or before them."""
    others = [("embedding",), ("layers", "attention_norm", "weight"), ("layers", "mixing", "filter")]
    return [*(matrix.path for matrix in matrices(config)), *others]


def _layer_flops(
    config: ModelConfig, T: int, finetune: FinetuneConfig, trains: Callable[[Path], bool], reached: bool, tiled: bool
) -> Flops:
    """All layers. They are one scan, whose backward pass is the same for all: none, or through every input."""
    mixing, own = _mixing(config, T, tiled), matrices(config)
    forward = sum(matrix.flops for matrix in own) + mixing
    adapters = _adapter_flops(own, finetune)
    if not reached:
        return Flops(forward, 0, 0)
    # Nothing reads the last product of a layer again: it ends in a sum.
    again = {"none": 0, "full": forward + adapters - own[-1].flops, "dots": mixing}
    backward = forward + mixing + sum(matrix.flops for matrix in own if trains(matrix.path)) + 2 * adapters
    return Flops(forward + adapters, backward, again[config.remat] + _chunks(config, T))


def _adapter_flops(own: Sequence[Matrix], finetune: FinetuneConfig) -> int:
    targets = [matrix for matrix in own if matrix.path[-2] in finetune.lora.targets]
    return sum(2 * finetune.lora.rank * (m.inputs + m.outputs) * m.layers for m in targets)


def _head_flops(config: ModelConfig, trains: Callable[[Path], bool], reached: bool) -> Flops:
    """The head. Logits are never kept: the backward pass computes them again."""
    tied = isinstance(config, LlamaConfig | Gpt2Config) and config.tie_embeddings
    path = ("embedding",) if tied else ("logits", "kernel")
    forward = 2 * config.width * config.vocabulary_size
    times = (reached or trains(("norm", "weight"))) + trains(path)
    return Flops(forward, times * forward, forward if times else 0)


def _medusa_flops(config: ModelConfig, finetune: FinetuneConfig, reached: bool) -> Flops:
    """Medusa heads; what they read needs gradients only if the model trains with them."""
    C, medusa = config.width, finetune.medusa
    block, logits = 2 * C * C, 2 * C * config.vocabulary_size
    forward = medusa.layers * block + logits
    unneeded = 0 if reached else (block if medusa.layers else logits)
    return Flops(medusa.heads * forward, medusa.heads * (2 * forward - unneeded), medusa.heads * forward)


def _transfer_flops(
    config: ModelConfig, T: int, finetune: FinetuneConfig, trains: Callable[[Path], bool], tiled: bool
) -> Flops:
    """The teacher's forward pass, and beside it every linearized attention, whose gradients end at its inputs."""
    own = matrices(config)
    projections = [m for m in own if m.path[-2] not in ("gate", "up", "down")]
    adapters = _adapter_flops(projections, finetune)
    mixing = _mixing(config, T, tiled)
    teacher = sum(m.flops for m in own) + _mixing(_all_softmax(config), T, tiled)
    student = sum(m.flops for m in projections) + mixing + adapters
    output = sum(m.flops for m in projections if m.path[-2] == "output")
    learned = sum(m.flops for m in projections if trains(m.path))
    backward = output + learned + 2 * adapters + 2 * mixing
    again = {"none": 0, "full": teacher + student, "dots": mixing}[config.remat]
    return Flops(teacher + student, backward, again + _chunks(config, T))


def _all_softmax(config: ModelConfig) -> Any:
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, kind="softmax"))


def matrices(config: ModelConfig) -> list[Matrix]:
    """The matrices of all layers, in the order in which they are used."""
    return _MATRICES[type(config)](config)


def _flash_matrices(config: FlashConfig) -> list[Matrix]:
    C, E, D, L = config.width, config.value_size, config.query_key_size, config.depth
    shapes = {"hidden": (C, 2 * E), "query_key": (C, D), "output": (E, C)}
    return [Matrix(("layers", name, "kernel"), *shape, L) for name, shape in shapes.items()]


def _llama_matrices(config: LlamaConfig) -> list[Matrix]:
    C, F, L = config.width, config.feed_forward_size, config.depth
    queries, keys = config.heads * config.head_size, config.key_value_heads * config.head_size
    attention = {"query": (C, queries), "key": (C, keys), "value": (C, keys), "output": (queries, C)}
    feed_forward = {"gate": (C, F), "up": (C, F), "down": (F, C)}
    groups = {"attention": attention, "feed_forward": feed_forward}
    return [Matrix(("layers", g, n, "kernel"), *shape, L) for g, named in groups.items() for n, shape in named.items()]


def _gpt2_matrices(config: Gpt2Config) -> list[Matrix]:
    C, F = config.width, config.feed_forward_size
    shapes = {"query_key_value": (C, 3 * C), "output": (C, C), "up": (C, F), "down": (F, C)}
    return [Matrix(("layers", name, "kernel"), *shape, config.depth) for name, shape in shapes.items()]


_MATRICES: dict[type, Callable[[Any], list[Matrix]]] = {
    FlashConfig: _flash_matrices,
    LlamaConfig: _llama_matrices,
    Gpt2Config: _gpt2_matrices,
}


def _mixing(config: ModelConfig, T: int, tiled: bool = False) -> int:
    """Forward operations of the attentions of all layers, without their projections, for one token."""
    if isinstance(config, FlashConfig):
        return config.depth * _attention_flops(config, T)
    keys = config.key_value_heads if isinstance(config, LlamaConfig) else config.heads
    kinds = layer_kinds(config.attention, config.depth)
    whole = [_mixing_flops(config.attention, kind, config.heads, keys, config.head_size, T) for kind in kinds]
    return sum(flops // 2 if tiled and kind == "softmax" else flops for flops, kind in zip(whole, kinds, strict=True))


def _chunks(config: ModelConfig, T: int) -> int:
    """Forward operations of augmented attentions, which keep no weights of their chunks for the backward pass."""
    if config.attention.kind != "augmented":
        return 0
    softmax = 0 if isinstance(config, FlashConfig) else len(set(config.attention.softmax_layers))
    augmented = dataclasses.replace(config.attention, softmax_layers=())
    return _mixing(dataclasses.replace(config, attention=augmented), T) * (config.depth - softmax) // config.depth


def _mixing_flops(attention: AttentionConfig, kind: str, H: int, K: int, D: int, T: int) -> int:
    """Forward operations of one layer's `Mixing` for one token: scores and values, and the grouped branch's state."""
    if kind == "softmax":
        return 4 * T * H * D
    if kind == "longlora":
        return 4 * -(-T // attention.longlora_split) * H * D
    S = min(attention.local_groups * attention.group_size, T)
    scores = 2 * S * H * D if attention.local != "none" else 0
    values = 2 * S * H * D if attention.local != "none" or attention.convolution else 0
    return scores + values + (2 * (H + K) * D * D if attention.grouped else 0)


def _attention_flops(config: FlashConfig, T: int) -> int:
    """Forward operations of one layer's attention for one token."""
    E, D, attention = config.value_size, config.query_key_size, config.attention
    if attention.kind != "augmented":
        return 2 * T * (D + E)
    groups = attention.local_groups if attention.causal else 2 * attention.local_groups - 1
    S = min(groups * attention.group_size, T)
    scores = 2 * S * D if attention.local != "none" else 0
    # The convolution shares the product of the scores with the values, unless castling comes in between.
    weighted = attention.local != "none" or (attention.convolution > 0 and not attention.castling)
    values = 2 * S * E if weighted else 0
    return scores + values + (_grouped_flops(config) if attention.grouped else 0)


def _grouped_flops(config: FlashConfig) -> int:
    """Random features of query and key, the key's part in the state, and the query's product with it."""
    E, D, P = config.value_size, config.query_key_size, config.attention.feature_size
    rows = {"favor": P, "fourier": P // 2}.get(config.attention.feature_map, 0)
    return 4 * D * rows + 4 * (P if rows else D) * E
