"""Whole models over meshes: losses and gradients of one device, exact bytes, no parameter whole at the start."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from benchmarks.parallel import difference, first_gradient, parts_of, small_model
from lin_jax.experiment import MeshConfig
from lin_jax.ops.linear_attention import AttentionArrays, AttentionOptions, attend
from lin_jax.ops.shards import Shards
from lin_jax.train.collectives import find_collectives, sent_bytes
from lin_jax.train.state import initial_state

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    ("architecture", "attention", "mesh", "remat"),
    [
        ("flash", {}, MeshConfig(data=2, sequence=2, tensor=2), "full"),
        ("llama", {"softmax_layers": (1,), "local_groups": 2}, MeshConfig(data=2, sequence=2, tensor=2), "dots"),
        ("gpt2", {}, MeshConfig(data=1, fsdp=4, tensor=2), "full"),
        ("gpt2", {}, MeshConfig(data=2, fsdp=4), "none"),
    ],
)
def test_loss_and_gradient_on_a_mesh_are_those_of_one_device(architecture, attention, mesh, remat):
    """`python -m benchmarks.parallel --losses` compares all models on all meshes, over 20 steps of training."""
    model = small_model(architecture, "augmented", **attention)
    expected, gradient = first_gradient(dataclasses.replace(model, remat="none"), MeshConfig(data=1), 1)
    loss, found = first_gradient(dataclasses.replace(model, remat=remat), mesh, 8)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert difference(found, gradient) < 1e-5


@pytest.mark.parametrize(("groups", "taps"), [(1, 32), (3, 8)])
def test_states_and_the_open_window_are_all_that_is_sent(groups, taps):
    """Forward and backward, to the byte, for rows of two lengths."""
    mesh = Mesh(np.array(jax.devices()), ("sequence",), axis_types=(AxisType.Auto,))
    shards, (B, H, K, D, E, G) = Shards(mesh, tokens=("sequence",)), (2, 4, 2, 8, 16, 16)

    def loss(q, k, v, conv_WH, position_BT):
        options = AttentionOptions(group_size=G, local_groups=groups)
        y, _ = attend(AttentionArrays(q, k, v, conv_WH=conv_WH), options, shards=shards, position_BT=position_BT)
        return jnp.sum(jnp.square(y))

    def sent(T):
        shapes = [(B, T, H, D), (B, T, K, D), (B, T, K, E), (taps, H)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays, jax.ShapeDtypeStruct((B, T), jnp.int32))
        return sent_bytes(find_collectives(lowered.compile().as_text()))

    window = (groups - 1) * G
    # States go to the next of 8 devices, and on in three rounds, of which the last needs no flags of resets.
    floats = B * K * (window * D + max(window, taps - 1) * E + 4 * D * E)
    assert sent(1024) == sent(8192) == {"collective-permute": 2 * 4 * floats + 3 * B}


def test_no_parameter_is_whole_on_a_device_at_the_start():
    """Neither at the end nor on the way: no array of the program that makes them is larger than a device's part."""
    model = dataclasses.replace(
        small_model("llama", "augmented"), vocabulary_size=4096, width=256, feed_forward_size=1024
    )
    parts = parts_of(model, MeshConfig(data=1, fsdp=4, tensor=2), 8, 8, 64, False)
    make = jax.jit(lambda seed: initial_state(parts.structure, parts.optimizer, seed), out_shardings=parts.shardings)
    compiled = make.lower(jnp.uint32(0)).compile()
    shapes = jax.eval_shape(parts.structure.initialise, jnp.uint32(0))[0]
    shardings = parts.structure.parameter_shardings(parts.partition)
    own = jax.tree.leaves(jax.tree.map(lambda s, d: math.prod(d.shard_shape(s.shape)), shapes, shardings))
    in_program = re.findall(r"\b(?:f32|u32|s32|pred|u8)\[([\d,]+)\]", compiled.as_text())
    assert max(math.prod(map(int, sizes.split(","))) for sizes in in_program) <= max(own)
    assert compiled.memory_analysis().output_size_in_bytes < 3 * 4 * sum(own) + 1024
