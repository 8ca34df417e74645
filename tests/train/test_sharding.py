"""Meshes, rules, where parameters lie, and the messages of settings that do not fit."""

import dataclasses

import jax
import numpy as np
import pytest

from lin_jax.experiment import AugmentedConfig, Config, ConfigError, DataConfig, FlashConfig, LlamaConfig, MeshConfig
from lin_jax.models.registry import create_model
from lin_jax.models.structure import make_structure
from lin_jax.train import sharding
from lin_jax.train.loop import show_sharding


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), {"data": 8}),
        (MeshConfig(fsdp=8), {"fsdp": 8}),
        (MeshConfig(data=2, fsdp=-1), {"data": 2, "fsdp": 4}),
        (MeshConfig(data=4, fsdp=2), {"data": 4, "fsdp": 2}),
        (MeshConfig(slice=2, tensor=2), {"slice": 2, "data": 2, "tensor": 2}),
        (MeshConfig(data=2, sequence=-1), {"data": 2, "sequence": 4}),
    ],
)
def test_minus_one_takes_what_is_left(config, shape):
    partition = sharding.make_partition(config)
    assert {axis: size for axis, size in partition.mesh.shape.items() if size > 1} == shape
    rows = [size for axis, size in shape.items() if axis in ("slice", "data", "fsdp")]
    assert sharding.batch_shards(partition) == np.prod(rows)


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(data=2, fsdp=2), MeshConfig(data=16, fsdp=-1)])
def test_a_mesh_that_does_not_fit_is_told(config):
    with pytest.raises(ConfigError, match=r"mesh\.data=.* does not fit 8 devices"):
        sharding.make_mesh(config)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device as far as meshes look at it."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "none"


def test_devices_of_a_slice_stay_together():
    devices = [Device(index, index % 2) for index in range(8)]
    tpus = [dataclasses.replace(device, platform="tpu") for device in devices]
    laid_out = sharding._lay_out((2, 1, 2, 1, 2), devices)
    assert laid_out.shape == (2, 1, 2, 1, 2)
    assert [{device.slice_index for device in part.flat} for part in laid_out] == [{0}, {1}]
    assert sharding._lay_out((1, 2, 2, 1, 2), devices).shape == (1, 2, 2, 1, 2)
    with pytest.raises(ConfigError, match=r"mesh\.slice=1, but the 8 devices are in 2 slices: set it to 2"):
        sharding._lay_out((1, 2, 2, 1, 2), tpus)


def test_a_batch_that_does_not_fit_is_told():
    partition = sharding.make_partition(MeshConfig())
    sharding.check_batch(partition, 32, 4)
    with pytest.raises(ConfigError, match=r"data\.batch_size=24 .* train\.microbatches=2 times 8 devices"):
        sharding.check_batch(partition, 24, 2)


LLAMA = {"heads": 6, "key_value_heads": 2, "feed_forward_size": 60}


@pytest.mark.parametrize(
    ("mesh", "model", "length", "message"),
    [
        (
            {"tensor": 4},
            LlamaConfig(**LLAMA),
            64,
            r"model\.heads=6 is not divisible by the 4 devices of mesh\.tensor=4",
        ),
        ({"tensor": 4}, LlamaConfig(**LLAMA | {"heads": 8}), 64, r"model\.key_value_heads=2 .* mesh\.tensor=4"),
        ({"tensor": 8}, LlamaConfig(heads=8, key_value_heads=8, feed_forward_size=60), 64, "feed_forward_size=60 .* 8"),
        ({"tensor": 8}, FlashConfig(width=6), 64, r"model\.value_size=12 .* mesh\.tensor=8"),
        ({"sequence": 8}, LlamaConfig(), 1001, r"data\.sequence_length=1001 .* mesh\.sequence=8"),
        (
            {"sequence": 8},
            LlamaConfig(attention=AugmentedConfig(group_size=64)),
            768,
            "is 96 tokens each, which is no multiple of model.attention.group_size=64",
        ),
        (
            {"sequence": 8},
            LlamaConfig(attention=AugmentedConfig(group_size=64, local_groups=2)),
            512,
            "is 64 tokens each, fewer than the 127 that .*local_groups=2, group_size=64 and convolution=32",
        ),
        ({"sequence": 2}, FlashConfig(attention=AugmentedConfig(causal=False)), 1024, "attention.causal=false"),
    ],
)
def test_a_model_that_does_not_fit_is_told(mesh, model, length, message):
    mesh = MeshConfig(**mesh)
    config = Config(model=model, mesh=mesh, data=DataConfig(sequence_length=length, batch_size=8))
    with pytest.raises(ConfigError, match=message):
        sharding.check_fit(config, sharding.make_partition(mesh))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("widht=fsdp", "unknown logical axis 'widht'; did you mean width"),
        ("width=fdsp", "unknown mesh axis 'fdsp'; did you mean fsdp"),
        ("tokens=data+sequence", "batch and tokens cannot both be cut along data"),
    ],
)
def test_a_rule_that_makes_no_sense_is_told(rule, message):
    with pytest.raises(ConfigError, match=message):
        sharding.make_partition(MeshConfig(rules=(rule,)))


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("width", "hidden"), (16, 32), (("fsdp",), ("tensor",))),
        (("width", "hidden"), (3, 16, 32), (None, ("fsdp",), ("tensor",))),
        (("width", "width"), (16, 16), (("fsdp",), None)),
        (("width",), (6,), (None,)),
        (("vocabulary", "width"), (15, 16), (None, ("fsdp",))),
        ((None,), (16,), (None,)),
        ((), (), ()),
    ],
)
def test_one_table_says_how_a_parameter_is_cut(axes, shape, expected):
    partition = sharding.make_partition(MeshConfig(data=1, fsdp=4, tensor=2))
    assert partition.spec(axes, shape) == expected


def test_rules_change_lines_of_the_table():
    rules = ("width=fsdp+sequence", "vocabulary=")
    partition = sharding.make_partition(MeshConfig(fsdp=2, sequence=2, tensor=2, rules=rules))
    assert partition.spec(("vocabulary", "width"), (16, 16)) == (None, ("fsdp", "sequence"))


def test_an_axis_that_is_not_in_the_table_is_a_mistake():
    with pytest.raises(KeyError, match="widht"):
        sharding.make_partition(MeshConfig()).spec(("widht",), (16,))


def test_rows_of_a_batch_go_to_their_devices():
    partition = sharding.make_partition(MeshConfig(data=2, fsdp=2, sequence=2))
    rows = np.arange(16 * 6).reshape(16, 6)
    array = jax.device_put(rows, sharding.batch_sharding(partition))
    assert {shard.data.shape for shard in array.addressable_shards} == {(4, 3)}


def test_the_table_of_a_whole_model_adds_up():
    config = FlashConfig(vocabulary_size=64, width=32, depth=2, query_key_size=16, rotary_size=8)
    text = show_sharding(Config(model=config, mesh=MeshConfig(data=1, fsdp=4, tensor=2)))
    structure = make_structure(lambda rngs: create_model(config, rngs))
    shapes = jax.eval_shape(structure.initialise, jax.numpy.uint32(0))[0]
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    mesh, cut, *lines = text.splitlines()
    assert mesh == "mesh: fsdp 4, tensor 2" and "vocabulary along tensor" in cut and "width along fsdp" in cut
    assert len(lines) == len(jax.tree.leaves(shapes)) + 2
    on_one = int(lines[-1].split()[0].replace(",", ""))
    assert on_one == sum(int(line.split()[-1].replace(",", "")) for line in lines[1:-1])
    assert whole / 8 <= on_one < whole / 4
    assert lines[1].split() == ["embedding", "[64,", "32]", "float32", "tensor,", "fsdp", "1,024"]
