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
from lin_jax.models.structure import Path
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
    return bool(lora.rank) or any(map(trains, _of_layers(config)))


def _of_layers(config: ModelConfig) -> list[Path]:
    """Parameters of every group that lies in the layers or before them."""
    others = [("embedding",), ("layers", "attention_norm", "weight"), ("layers", "mixing", "filter")]
    return [*(matrix.path for matrix in matrices(config)), *others]


def layer_flops(config: ModelConfig, T: int, lora: LoraConfig, trains: Callable[[Path], bool], *, tiled: bool) -> Flops:
    """Return the operations of all layers; see `training_flops`.

    They are one scan, whose backward pass is the same for all: none, or through every input.
    """
    mixing, own = mixing_flops(config, T, tiled), matrices(config)
    forward = sum(matrix.flops for matrix in own) + mixing
    adapters = adapter_flops(own, lora)
    if not reaches_layers(config, lora, trains):
        return Flops(forward, 0, 0)
    # Nothing reads the last product of a layer again: it ends in a sum.
    again = {"none": 0, "full": forward + adapters - own[-1].flops, "dots": mixing}
    backward = forward + mixing + sum(matrix.flops for matrix in own if trains(matrix.path)) + 2 * adapters
    return Flops(forward + adapters, backward, again[config.remat] + chunk_flops(config, T))


def adapter_flops(own: Sequence[Matrix], lora: LoraConfig) -> int:
    """Return the forward operations of the adapters of some matrices."""
    targets = [matrix for matrix in own if matrix.path[-2] in lora.targets]
    return sum(2 * lora.rank * (m.inputs + m.outputs) * m.layers for m in targets)


def head_flops(config: ModelConfig, trains: Callable[[Path], bool], reached: bool) -> Flops:
    """Return the operations of the head; `reached`: whether gradients go on into the layers.

    Logits are never kept: the backward pass computes them again.
    """
    tied = isinstance(config, LlamaConfig | Gpt2Config) and config.tie_embeddings
    path = ("embedding",) if tied else ("logits", "kernel")
    forward = 2 * config.width * config.vocabulary_size
    times = (reached or trains(("norm", "weight"))) + trains(path)
    return Flops(forward, times * forward, forward if times else 0)


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


def mixing_flops(config: ModelConfig, T: int, tiled: bool = False) -> int:
    """Return the forward operations of the attentions of all layers, without their projections, for one token."""
    if isinstance(config, FlashConfig):
        return config.depth * _attention_flops(config, T)
    keys = config.key_value_heads if isinstance(config, LlamaConfig) else config.heads
    kinds = layer_kinds(config.attention, config.depth)
    whole = [_kind_flops(config.attention, kind, config.heads, keys, config.head_size, T) for kind in kinds]
    return sum(flops // 2 if tiled and kind == "softmax" else flops for flops, kind in zip(whole, kinds, strict=True))


def chunk_flops(config: ModelConfig, T: int) -> int:
    """Return the forward operations of augmented attentions, which keep no weights of chunks for the backward pass."""
    if config.attention.kind != "augmented":
        return 0
    softmax = 0 if isinstance(config, FlashConfig) else len(set(config.attention.softmax_layers))
    augmented = dataclasses.replace(config.attention, softmax_layers=())
    return mixing_flops(dataclasses.replace(config, attention=augmented), T) * (config.depth - softmax) // config.depth


def _kind_flops(attention: AttentionConfig, kind: str, H: int, K: int, D: int, T: int) -> int:
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
