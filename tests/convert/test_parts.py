"""No parameter of a sharded model is ever whole on a device or in host memory: made, converted, restored or a base."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import serialization
from safetensors.numpy import load_file

from lin_jax.convert import names, tensors
from lin_jax.convert.checkpoint_files import CheckpointFiles
from lin_jax.convert.hugging_face import (
    ModelWeights,
    Placement,
    nested,
    read_hugging_face,
    shapes_of,
    write_hugging_face,
)
from lin_jax.data.tokenizers import BytesTokenizer
from lin_jax.experiment import Config, DataConfig, LlamaConfig, MeshConfig, SoftmaxConfig
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.train.parts import make_parts
from lin_jax.train.saved_model import load_model, save_model
from lin_jax.train.sharding import make_mesh, make_partition
from lin_jax.train.state import initial_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

PARTS = 8
CUT = MeshConfig(data=1, fsdp=PARTS)
MODEL = LlamaConfig(
    vocabulary_size=264,
    width=64,
    depth=2,
    heads=4,
    key_value_heads=2,
    head_size=16,
    feed_forward_size=72,
    positions=64,
    attention=SoftmaxConfig(),
)
CONFIG = Config(model=MODEL, data=DataConfig(batch_size=8, sequence_length=32), mesh=CUT)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    random = np.random.default_rng(0)
    arrays = {path: jnp.asarray(random.normal(size=s.shape), s.dtype) for path, s in shapes_of(MODEL).items()}
    write_hugging_face(path, ModelWeights(MODEL, arrays), None, {})
    return path


@pytest.fixture(scope="module")
def weights(directory):
    return read_hugging_face(directory, placement=Placement(make_mesh(CUT)))


def largest_part(shapes):
    """Numbers in the largest part of a model: of an embedding, or of one layer's matrix."""
    return max(math.prod(shape) for shape in shapes) // PARTS


def test_a_new_state_is_made_in_parts():
    parts = make_parts(CONFIG, make_partition(CUT))
    make = jax.jit(lambda seed: initial_state(parts.structure, parts.optimizer, seed), out_shardings=parts.shardings)
    program = make.lower(jnp.uint32(0)).compile().as_text()
    sizes = [math.prod(map(int, found.split(","))) for found in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program)]
    assert max(sizes) == largest_part([shape.shape for shape in shapes_of(MODEL).values()])


def whole(entry, array, layer, original=names._their_array):
    found = original(entry, array, layer)
    assert found.ndim == 1, f"{entry.theirs} is made whole"
    return found


def test_a_conversion_reads_and_writes_parts(directory, tmp_path, monkeypatch):
    read = []

    def part(self, name, index, original=CheckpointFiles.part):
        found = original(self, name, index)
        read.append((name, found.size))
        return found

    monkeypatch.setattr(CheckpointFiles, "part", part)
    found = read_hugging_face(directory, placement=Placement(make_mesh(CUT)))
    shapes = CheckpointFiles(directory).shapes
    matrices = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    for name, size in matrices.items():
        assert [part for other, part in read if other == name] == [size // PARTS] * PARTS, name
    # And back, from parts on devices to rows in a file.
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(names, "_their_array", whole)
    write_hugging_face(tmp_path, found, None, {})
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path, directory))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


def test_a_model_is_restored_in_parts(weights, tmp_path, monkeypatch):
    save_model(str(tmp_path), nested(weights.arrays), CONFIG, BytesTokenizer())
    read = []

    async def read_shard(original=serialization._read_shard, **arguments):
        found = await original(**arguments)
        read.append(found.size)
        return found

    monkeypatch.setattr(serialization, "_read_shard", lambda t, **arguments: read_shard(t=t, **arguments))
    model, _, _ = load_model(str(tmp_path), make_mesh(CUT))
    found = parameters_by_path(model)
    assert max(read) == largest_part([array.shape for array in found.values()])
    for name, array in weights.arrays.items():
        assert found[name].sharding.is_equivalent_to(array.sharding, array.ndim), name
        np.testing.assert_array_equal(found[name], array)
