"""Meshes, where parameters lie, and the messages of settings that do not fit."""

import jax
import numpy as np
import pytest

from lin_jax.config import Config, ConfigError, FlashConfig, MeshConfig
from lin_jax.models.registry import create_model
from lin_jax.train import sharding
from lin_jax.train.loop import show_sharding
from lin_jax.train.state import make_structure


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1)),
        (MeshConfig(fsdp=8), (1, 8)),
        (MeshConfig(data=2, fsdp=-1), (2, 4)),
        (MeshConfig(data=4, fsdp=2), (4, 2)),
    ],
)
def test_minus_one_takes_what_is_left(config, shape):
    mesh = sharding.make_mesh(config)
    assert tuple(mesh.shape.values()) == shape and sharding.batch_shards(mesh) == 8


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(data=2, fsdp=2), MeshConfig(data=16, fsdp=-1)])
def test_a_mesh_that_does_not_fit_is_told(config):
    with pytest.raises(ConfigError, match=r"mesh\.data=.*mesh\.fsdp=.* does not fit 8 devices"):
        sharding.make_mesh(config)


def test_a_batch_that_does_not_fit_is_told():
    mesh = sharding.make_mesh(MeshConfig())
    sharding.check_batch(mesh, 32, 4)
    with pytest.raises(ConfigError, match=r"data\.batch_size=24 .* train\.microbatches=2 times 8 devices"):
        sharding.check_batch(mesh, 24, 2)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("width", "hidden"), (16, 32), ("fsdp", None)),
        (("width", "hidden"), (3, 16, 32), (None, "fsdp", None)),
        (("width", "width"), (16, 16), ("fsdp", None)),
        (("width",), (6,), (None,)),
        ((None,), (16,), (None,)),
        ((), (), ()),
    ],
)
def test_one_table_says_how_a_parameter_is_cut(axes, shape, expected):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    assert tuple(sharding.parameter_sharding(mesh, axes, shape).spec) == expected


def test_an_axis_that_is_not_in_the_table_is_a_mistake():
    mesh = sharding.make_mesh(MeshConfig())
    with pytest.raises(KeyError, match="widht"):
        sharding.parameter_sharding(mesh, ("widht",), (16,))


def test_rows_of_a_batch_go_to_their_devices():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    rows = np.arange(16 * 3).reshape(16, 3)
    array = sharding.global_batch({"tokens": rows}, sharding.batch_sharding(mesh))["tokens"]
    np.testing.assert_array_equal(array, rows)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 3)}


def test_the_table_of_a_whole_model_adds_up():
    config = FlashConfig(vocabulary_size=64, width=32, depth=2, query_key_size=16, rotary_size=8)
    text = show_sharding(Config(model=config, mesh=MeshConfig(data=1, fsdp=8)))
    structure = make_structure(lambda rngs: create_model(config, rngs))
    shapes = jax.eval_shape(structure.initialise, jax.numpy.uint32(0))[0]
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    lines = text.splitlines()
    assert len(lines) == len(jax.tree.leaves(shapes)) + 2
    on_one = int(lines[-1].split()[0].replace(",", ""))
    assert on_one == sum(int(line.split()[-1].replace(",", "")) for line in lines[1:-1])
    assert whole / 8 <= on_one < whole / 4
    assert lines[1].split() == ["embedding", "[64,", "32]", "float32", "-,", "fsdp", "1,024"]
