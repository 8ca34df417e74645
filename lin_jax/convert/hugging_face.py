"""Directories of Hugging Face: config.json, tensors, tokenizer."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from lin_jax.convert.adapter import Adapted
from lin_jax.convert.checkpoint_files import FLOATS, CheckpointFiles, write_tensors
from lin_jax.convert.conversion import Conversion, conversion_of, conversion_of_type
from lin_jax.convert.hugging_face_config import WRITTEN
from lin_jax.convert.names import Entry, names_of, read, tensors_of, unused_names
from lin_jax.convert.tensors import Renamed, Tensor, Tensors, are_equal
from lin_jax.layers.parameter import constants_by_path, parameters_by_path
from lin_jax.models.base import ModelConfig
from lin_jax.models.registry import create_model
from lin_jax.models.structure import make_structure
from lin_jax.settings.base import ConfigError, require
from lin_jax.settings.foreign import Fields, read_object
from lin_jax.train.sharding import default_partition

# How the names of a model's constants begin, which no other program knows.
CONSTANTS = "lin_jax.constants."


@dataclasses.dataclass(frozen=True)
class ModelWeights:
    """A model as its settings and its parameters by path; see `lin_jax.layers.parameter.parameters_by_path`.

    Attributes:
        config: the settings.
        arrays: the parameters, each in its own type.
        unused: names of the source's tensors that hold no parameters of the model.
        constants: likewise by path.
    """

    config: ModelConfig
    arrays: Mapping[str, Array]
    unused: tuple[str, ...] = ()
    constants: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def model(self) -> Any:
        """The model."""
        structure = make_structure(lambda rngs: create_model(self.config, rngs))
        return structure.merge(nested(self.arrays), nested(self.constants))


def nested(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Return arrays by path as the tree that checkpoints hold."""
    return nnx.traversals.unflatten_mapping({tuple(path.split(".")): array for path, array in arrays.items()})


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where parameters are to lie, and in which type.

    Attributes:
        mesh: the devices; None is the first one.
        dtype: of all parameters; None keeps the type of each, but for float64, which becomes float32.
        float16: whether float16 may stay; else it becomes float32.
    """

    mesh: Mesh | None = None
    dtype: str | None = None
    float16: bool = False

    def type_of(self, name: str) -> str:
        """The type in which a parameter of the type `name` is to be held."""
        narrow = name == "float64" or (name == "float16" and not self.float16)
        return self.dtype or ("float32" if narrow else name)


def shapes_of(config: ModelConfig) -> dict[str, Any]:
    """Shape and type of every parameter by path."""
    return parameters_by_path(nnx.eval_shape(lambda: create_model(config, nnx.Rngs(0))))


def read_hugging_face(directory: Path, adapter: Path | None = None, placement: Placement = Placement()) -> ModelWeights:
    """The model of a directory.

    Args:
        directory: with config.json and tensors.
        adapter: a LoRA adapter that is merged into it.
        placement: where the parameters are to lie, and their type.

    Raises:
        ConfigError: it is not one, of an unknown architecture, or its files do not agree with each other.
    """
    config, family, tensors = _opened(directory, adapter)
    ours = {name: name.removeprefix(CONSTANTS) for name in tensors if name.startswith(CONSTANTS)}
    plain = Renamed(tensors, {name: name for name in tensors if name not in ours}) if ours else tensors
    weights = read_tensors(config, family.name_table(config), plain, family.ignored(config), placement)
    return dataclasses.replace(weights, constants=_read_constants(config, {ours[name]: tensors[name] for name in ours}))


def read_model_settings(directory: Path) -> ModelConfig:
    """Return the settings of a directory's model, without its parameters; raise `ConfigError` as for these."""
    return _opened(directory, None)[0]


def _opened(directory: Path, adapter: Path | None) -> tuple[Any, Conversion, Tensors]:
    """Return the settings of a directory's model, what knows its names, and its tensors, which are not read yet."""
    fields = read_config(directory)
    family = conversion_of_type(fields.get("model_type", str), fields.place)
    quantized = fields.section("quantization_config")
    fields.require(not quantized, "quantization_config: quantized tensors are not supported, only floats")
    tensors = family.renamed(CheckpointFiles(directory))
    is_tied = fields.get("tie_word_embeddings", bool, family.is_tied)
    if is_tied:
        tensors, is_tied = _untie(tensors, adapter, family)
    elif adapter is not None:
        tensors = Adapted(tensors, adapter, family.conv1d)
    config = _config(family, fields, tensors)
    if hasattr(config, "tie_embeddings"):  # The tensors decide, see `_untie`; some models have nothing to tie.
        config = dataclasses.replace(config, tie_embeddings=is_tied)
    return config, family, tensors


def _config(family: Conversion, fields: Fields, tensors: Tensors) -> Any:
    """Our settings; raises `ConfigError`, which begins with the file."""
    try:
        config = family.config_from(fields, tensors.shapes)
    except ConfigError as error:  # of our settings, where one of theirs has the right type and makes no sense
        about = str(error)
        raise ConfigError(about if about.startswith(fields.place) else f"{fields.place}: {about}") from error
    fields.require(config.depth <= len(tensors), f"{config.depth} layers, but there are {len(tensors)} tensors")
    return config


def _read_constants(config: ModelConfig, found: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """The constants of a model among a directory's own tensors."""
    wanted = constants_by_path(nnx.eval_shape(lambda: create_model(config, nnx.Rngs(0))))
    for path, shape in wanted.items():
        require(path in found, f"the checkpoint lacks {CONSTANTS}{path}, a constant of its attention")
        require(found[path].shape == shape.shape, f"{CONSTANTS}{path} has shape {found[path].shape}, not {shape.shape}")
    return {path: jnp.asarray(found[path], jnp.float32) for path in wanted}


def _untie(tensors: Tensors, adapter: Path | None, family: Conversion) -> tuple[Tensors, bool]:
    """Return the tensors of a model whose config.json says that head and embedding are one, and whether they are.

    The tensors decide, as in transformers: a file that holds both, not equal, has a head of its own; one that holds
    either alone means both by it. An adapter changes the one that it names, as PEFT does while it trains, and not the
    other, unless its `ensure_weight_tying` says so.
    """
    pair = {family.embedding, family.head}
    found = pair & tensors.keys()
    if not found:  # a model inside another, which has no head of tokens
        return (tensors if adapter is None else Adapted(tensors, adapter, family.conv1d)), True
    if len(found) == 1:
        alone = next(iter(found))
        tensors = Renamed(tensors, dict.fromkeys(pair, alone) | {name: name for name in tensors})
    source, are_one = family.embedding, len(found) == 1
    if adapter is not None:
        adapted = Adapted(tensors, adapter, family.conv1d)
        tensors, changed = adapted, pair & adapted.changed
        if changed and adapted.ties:
            source, are_one = (source if source in changed else family.head), True
        else:
            are_one = are_one and not changed
    are_one = are_one or (len(found) > 0 and are_equal(tensors, family.embedding, family.head))
    if not are_one:
        return tensors, False
    return Renamed(tensors, {name: name for name in tensors if name not in pair} | {family.embedding: source}), True


def read_tensors(
    config: ModelConfig,
    table: list[Entry],
    tensors: Tensors,
    ignored: tuple[str, ...],
    placement: Placement = Placement(),
) -> ModelWeights:
    """A model of another code's tensors, one at a time.

    Args:
        config: of the model.
        table: see `lin_jax.convert.names.read`.
        tensors: the other code's.
        ignored: ends of names that hold no parameters.
        placement: where the parameters are to lie, and their type.

    Raises:
        ConfigError: names, shapes or types that do not fit `config`.
    """
    wanted = _wanted(config, table, tensors, placement)
    arrays = read(wanted, table, tensors, config.depth, ignored)
    return ModelWeights(config, arrays, tuple(unused_names(table, tensors, config.depth)))


def _wanted(config: ModelConfig, table: list[Entry], tensors: Tensors, placement: Placement) -> dict[str, Any]:
    """Shape, type and place of every parameter."""
    structure = make_structure(lambda rngs: create_model(config, rngs))
    flat = nnx.to_flat_state(structure.abstract_parameters)
    types = {entry.ours: _type_of(entry, tensors, config.depth, placement) for entry in table}
    wanted = {}
    for path, variable in flat:
        name, shape = ".".join(map(str, path)), variable.get_value().shape
        where = None if placement.mesh is None else default_partition(placement.mesh).sharding(variable.axes, shape)
        wanted[name] = jax.ShapeDtypeStruct(shape, types.get(name, np.float32), sharding=where)
    return wanted


def _type_of(entry: Entry, tensors: Tensors, depth: int, placement: Placement) -> np.dtype:
    """The type that holds all layers of one parameter."""
    found = {name: tensors.types[name] for name in names_of(entry, depth) if name in tensors}
    for name, kind in found.items():
        require(kind in FLOATS, f"{name} is of type {kind}, but parameters are {', '.join(FLOATS)}")
    kinds = {np.dtype(placement.type_of(kind)) for kind in found.values()}
    return np.result_type(*kinds) if kinds else np.dtype(np.float32)


def read_config(directory: Path) -> Fields:
    """The contents of config.json; raises `ConfigError` without it."""
    file = directory / "config.json"
    require(file.exists(), f"{directory} has no config.json, and is no run of lin_jax")
    return read_object(file)


def write_hugging_face(directory: Path, weights: ModelWeights, dtype: str | None, more: Mapping[str, Any]) -> None:
    """Write config.json and tensors.

    Args:
        directory: exists.
        weights: the model.
        dtype: type of the tensors; None keeps that of each.
        more: further entries of config.json, such as the ids of the tokens that begin and end a text, or what the
            source's config.json holds; those that the model decides are written from it.

    Raises:
        ConfigError: Hugging Face has no such model.
    """
    family, config = conversion_of(weights.config), weights.config
    kind = dtype or np.dtype(weights.arrays["embedding"].dtype).name
    kept = {name: value for name, value in more.items() if name not in (*WRITTEN, *family.replaced)}
    values = {**kept, **family.config_to(config), "torch_dtype": kind}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    write_tensors(directory, list(_tensors(family, weights, dtype)))


def _tensors(family: Conversion, weights: ModelWeights, dtype: str | None) -> Iterator[Tensor]:
    for tensor in tensors_of(family.name_table(weights.config), weights.arrays, weights.config.depth):
        yield tensor if dtype is None else dataclasses.replace(tensor, dtype=np.dtype(dtype))
    for name, array in family.extra_tensors(weights.config).items():
        yield Tensor(name, array.shape, np.dtype(dtype or array.dtype), functools.partial(np.asarray, array))
    for path, constant in weights.constants.items():
        yield Tensor(CONSTANTS + path, constant.shape, np.dtype(np.float32), functools.partial(np.asarray, constant))
