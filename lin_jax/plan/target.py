"""Devices that a plan is for: those of a TPU topology, compiled for by libtpu, or virtual ones of this CPU."""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax

from lin_jax.chips import Chip, chip_count, chip_named
from lin_jax.plan import cuda
from lin_jax.settings.base import ConfigError, require

# libtpu asks a machine of the cloud about itself, and holds its chips, unless it is told not to.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
# Virtual devices at least, where they stand for GPUs.
VIRTUAL = 64
# Topologies that are smaller than a host of v5e and v6e, which libtpu otherwise takes to be of 2x2 chips.
_SINGLE = {"chips_per_host_bounds": (1, 1, 1)}


@dataclasses.dataclass(frozen=True)
class Target:
    """What `--config.plan` names.

    Attributes:
        name: as given, such as v5e:8x8.
        chip: None for virtual devices that stand for nothing.
        topology: of a TPU, 8x8; otherwise the number of devices.
        slices: TPU slices, each of this topology.
    """

    name: str
    chip: Chip | None
    topology: str
    slices: int = 1

    @property
    def count(self) -> int:
        """Devices altogether."""
        return self.slices * chip_count(self.topology)

    @property
    def compiles(self) -> bool:
        """Whether there is a compiler for the very chip; else the step is compiled for this CPU."""
        if self.chip is None:
            return False
        return self.chip.platform == "tpu" or cuda.is_installed()


def parse(plan: str) -> Target:
    """The target of `--config.plan`: cpu:8, v5e:8x8, 2*v5e:8x8 or h100:8."""
    slices, _, name = plan.rpartition("*")
    kind, _, topology = name.partition(":")
    return Target(plan, None if kind == "cpu" else chip_named(kind), topology, int(slices or 1))


def prepare(target: Target) -> None:
    """Make this process ready to compile for a target; call it before anything is computed.

    Raises:
        ConfigError: libtpu is needed and not installed.
    """
    jax.config.update("jax_platforms", "cpu")
    if target.chip is None or target.chip.platform == "gpu":
        # More than are asked for, so that more can be tried if these do not do.
        jax.config.update("jax_num_cpu_devices", target.count if target.chip is None else max(target.count, VIRTUAL))
        os.environ.update(cuda.ENVIRONMENT)
        return
    require(
        importlib.util.find_spec("libtpu") is not None,
        f"plan={target.name} compiles for TPUs, which needs libtpu: pip install 'lin_jax[tpu]' (in a clone: "
        "pip install -e '.[tpu]'); no TPU is needed",
    )
    os.environ.update(_ENVIRONMENT)


def virtual_devices(target: Target) -> Sequence[jax.Device]:
    """As many devices of this CPU."""
    return jax.devices()[: target.count]


def devices(target: Target) -> Sequence[jax.Device]:
    """The target's devices, which need not exist.

    Raises:
        ConfigError: there is no such topology.
    """
    if target.chip is None or not target.compiles:
        return virtual_devices(target)
    if target.chip.platform == "gpu":
        return cuda.devices(target.chip, target.count)
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": "megacore"} if target.chip.name == "v4" else {}
    options |= _SINGLE if target.topology == "1x1" else {}
    options |= {"num_slices": target.slices} if target.slices > 1 else {}
    try:
        name = f"{target.chip.name}:{target.topology}"
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"plan={target.name} names no topology of TPUs: {reason}") from error
