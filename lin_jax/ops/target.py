"""The device that a computation is meant for, which need not be one of this machine."""

from typing import NamedTuple

import jax


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
