"""Files of llama2.c: a header of seven numbers and the arrays of a LLaMA.

Three forms (llama2.c's export.py): the first has no mark, float32 arrays and the tables of the rotation; version 1 is
float32 without them; version 2 has int8 groups with a float32 scale each, except for the norms.
"""

import dataclasses
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lin_jax.attentions.softmax import SoftmaxConfig
from lin_jax.convert.tensors import Tensors
from lin_jax.models.llama import LlamaConfig
from lin_jax.settings.base import ConfigError, require

_MARK, _HEADER = 0x616B3432, 256
_LAYER = "model.layers.{}."
_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclasses.dataclass(frozen=True)
class _Head:
    """What a file says of itself; `version` 0 is the form without a mark."""

    version: int
    width: int
    feed_forward: int
    depth: int
    heads: int
    key_value_heads: int
    vocabulary: int
    positions: int
    tied: bool
    group: int
    bytes: int

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def sensible(self) -> bool:
        """Whether these can be a model's numbers."""
        sizes = (self.width, self.feed_forward, self.depth, self.heads, self.key_value_heads, self.positions)
        if min(*sizes, self.vocabulary, self.group) <= 0 or max(*sizes, self.vocabulary) >= 1 << 24:
            return False
        return self.width % self.heads == 0 and self.heads % self.key_value_heads == 0 and self.depth < 1 << 12


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an array lies in a file, and whether it is in groups of int8."""

    shape: tuple[int, ...]
    offset: int
    grouped: bool


def is_llama2c(file: Path) -> bool:
    """Whether a file begins as one of llama2.c does."""
    head = _read_head(file)
    return head is not None and (head.version > 0 or head.sensible)


class Llama2cFile(Tensors):
    """The arrays of a file under Hugging Face's names, with queries and keys in its order of rotated pairs.

    Attributes:
        config: of the model. The file does not tell the base of the rotation and the norms' epsilon: they are those
            that llama2.c computes with.

    Raises:
        ConfigError: the version is unknown, the numbers are no model's, or the file is cut short.
    """

    def __init__(self, file: Path):
        head = _read_head(file)
        if head is None or head.version > 2 or not head.sensible:
            raise ConfigError(f"{file} is no file of llama2.c in its first form, version 1 or version 2")
        self._head = head
        self._places, end = _lay_out(head)
        size = file.stat().st_size
        require(size >= end, f"{file} is cut short: it has {size:,} bytes, but its header means {end:,}")
        require(size == end, f"{file} has {size:,} bytes, but its header means {end:,}")
        self._bytes = np.memmap(file, np.uint8, "r")
        self.shapes = {name: place.shape for name, place in self._places.items()}
        self.types = dict.fromkeys(self.shapes, "float32")
        self.config = _config(head)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._read(self._places[name])
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # Pairs of neighbours become pairs of the first and the second half of a head.
            pairs = array.reshape(-1, self._head.head_size // 2, 2, array.shape[-1])
            return pairs.swapaxes(1, 2).reshape(array.shape)
        return array

    def _read(self, place: _Place) -> np.ndarray:
        size = math.prod(place.shape)
        if not place.grouped:
            return np.frombuffer(self._bytes, "<f4", size, place.offset).reshape(place.shape).copy()
        whole = np.frombuffer(self._bytes, np.int8, size, place.offset).reshape(-1, self._head.group)
        scales = np.frombuffer(self._bytes, "<f4", len(whole), place.offset + size)
        return (whole * scales[:, None]).reshape(place.shape)


def _read_head(file: Path) -> _Head | None:
    with file.open("rb") as opened:
        start = opened.read(_HEADER)
    if len(start) < 28:
        return None
    if struct.unpack_from("<I", start)[0] != _MARK:
        C, F, L, H, K, vocabulary, positions = struct.unpack_from("<7i", start)
        return _Head(0, C, F, L, H, K, abs(vocabulary), positions, tied=vocabulary > 0, group=1, bytes=28)
    if len(start) < _HEADER:
        raise ConfigError(f"{file} is cut short within its header")
    version, C, F, L, H, K, vocabulary, positions = struct.unpack_from("<8i", start, 4)
    tied, group = struct.unpack_from("<Bi", start, 36)
    group = group if version == 2 else 1
    return _Head(version, C, F, L, H, K, vocabulary, positions, tied=bool(tied), group=group, bytes=_HEADER)


def _config(head: _Head) -> LlamaConfig:
    return LlamaConfig(
        vocabulary_size=head.vocabulary,
        width=head.width,
        depth=head.depth,
        heads=head.heads,
        key_value_heads=head.key_value_heads,
        head_size=head.head_size,
        feed_forward_size=head.feed_forward,
        positions=head.positions,
        norm_epsilon=1e-5,
        tie_embeddings=head.tied,
        attention=SoftmaxConfig(),
    )


def _lay_out(head: _Head) -> tuple[dict[str, _Place], int]:
    """Where every array lies, and where the last one ends."""
    places, offset = {}, head.bytes
    for name, shape in _order(head):
        size, grouped = math.prod(shape), head.version == 2 and len(shape) > 1
        if grouped and size % head.group:
            raise ConfigError(f"{name} of {size} numbers does not divide into the file's groups of {head.group}")
        if name:
            places[name] = _Place(shape, offset, grouped)
        offset += size + 4 * (size // head.group) if grouped else 4 * size
    return places, offset


def _order(head: _Head) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the file; what has no name is passed over."""
    embedding = ("model.embed_tokens.weight", (head.vocabulary, head.width))
    final = ("model.norm.weight", (head.width,))
    matrices = _matrices(head)
    if head.version == 0:
        yield embedding
        yield from _layers(head, [(_NORMS[0], (head.width,)), *matrices[:4], (_NORMS[1], (head.width,))])
        # w1, w2, w3: gate, down, up
        yield from _layers(head, matrices[4:])
        yield final
        yield "", (2, head.positions, head.head_size // 2)
    else:
        yield from _layers(head, [(name, (head.width,)) for name in _NORMS])
        yield final
        yield embedding
        yield from _layers(head, matrices)
    if not head.tied:
        yield "lm_head.weight", (head.vocabulary, head.width)


def _layers(head: _Head, kinds: list[tuple[str, tuple[int, ...]]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """All layers' arrays of one kind after another."""
    for name, shape in kinds:
        yield from ((f"{_LAYER.format(layer)}{name}.weight", shape) for layer in range(head.depth))


def _matrices(head: _Head) -> list[tuple[str, tuple[int, ...]]]:
    C, F, narrow = head.width, head.feed_forward, head.key_value_heads * head.head_size
    return [
        ("self_attn.q_proj", (C, C)),
        ("self_attn.k_proj", (narrow, C)),
        ("self_attn.v_proj", (narrow, C)),
        ("self_attn.o_proj", (C, C)),
        ("mlp.gate_proj", (F, C)),
        ("mlp.down_proj", (C, F)),
        ("mlp.up_proj", (F, C)),
    ]
