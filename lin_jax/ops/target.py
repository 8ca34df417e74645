"""The device that a computation is meant for, which need not be one of this machine."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class TargetDevice(NamedTuple):
    """A device: its `platform` as JAX names it (cpu, gpu, tpu) and its kind."""

    platform: str
    device_kind: str


def target() -> TargetDevice:
    """A device of the mesh that the caller set (`jax.set_mesh`), or else JAX's default one.

    A program that is compiled for other devices than those of this machine has to be traced under their mesh.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.devices()[0]
    return TargetDevice(device.platform, device.device_kind)


def decoding_type(dtype: DTypeLike) -> jnp.dtype:
    """Return the type of activations and states in decoding, for a model that computes in `dtype`.

    It is `dtype`, but float32 on a CPU. There every program, one for each number of rows and nodes, is free to round to
    16 bits in other places, so that a tree's features differ from a step's by the rounding of bfloat16, and greedy
    texts with them; a CPU adds in float32 anyway. Parameters keep their type.
    """
    return jnp.dtype(jnp.float32 if target().platform == "cpu" else dtype)
