"""What accelerators can do, from their makers' public figures: memory, arithmetic and bandwidths of one chip."""

import dataclasses
import math
from typing import Literal

GIB = 2**30

# Where the figures are from. Of bandwidths given for both directions, half is what a chip can send.
_CLOUD = "https://cloud.google.com/tpu/docs/"
_BOOK = "https://jax-ml.github.io/scaling-book/tpus/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of device.

    Attributes:
        name: in `--config.plan`.
        kinds: what JAX's `device_kind` contains; the first chip of `CHIPS` that matches is meant.
        platform: as JAX names it.
        memory: bytes of HBM.
        flops: dense bf16 operations a second.
        memory_bandwidth: bytes a second between HBM and the chip.
        interconnect: bytes a second that one chip can send to others of its slice (ICI) or node (NVLink), all links
            together.
        network: bytes a second that one chip can send beyond its slice or node.
        linked: most chips that the interconnect joins.
        sources: pages that the figures are from.
    """

    name: str
    kinds: tuple[str, ...]
    platform: Literal["tpu", "gpu"]
    memory: int
    flops: float
    memory_bandwidth: float
    interconnect: float
    network: float
    linked: int
    sources: tuple[str, ...]


CHIPS = (
    Chip(
        name="v6e",
        kinds=("v6 lite", "v6e"),
        platform="tpu",
        memory=32 * GIB,
        flops=918e12,
        memory_bandwidth=1638e9,
        interconnect=400e9,
        network=12.5e9,
        linked=256,
        sources=(_CLOUD + "v6e",),
    ),
    Chip(
        name="v5p",
        kinds=("v5p",),
        platform="tpu",
        memory=95 * GIB,
        flops=459e12,
        memory_bandwidth=2765e9,
        interconnect=600e9,
        network=6.25e9,
        linked=6144,
        sources=(_CLOUD + "v5p",),
    ),
    Chip(
        name="v5e",
        kinds=("v5 lite", "v5e"),
        platform="tpu",
        memory=16 * GIB,
        flops=197e12,
        memory_bandwidth=819e9,
        interconnect=200e9,
        network=3.125e9,
        linked=256,
        sources=(_CLOUD + "v5e",),
    ),
    Chip(
        name="v4",
        kinds=("v4",),
        platform="tpu",
        memory=32 * GIB,
        flops=275e12,
        memory_bandwidth=1200e9,
        interconnect=270e9,
        network=6.25e9,
        linked=4096,
        sources=(_CLOUD + "v4", _BOOK),
    ),
    Chip(
        name="h200",
        kinds=("H200",),
        platform="gpu",
        memory=140 * GIB,
        flops=989e12,
        memory_bandwidth=4800e9,
        interconnect=450e9,
        network=50e9,
        linked=8,
        sources=(_NVIDIA + "h200/", "https://docs.nvidia.com/dgx/dgxh100-user-guide/"),
    ),
    Chip(
        name="h100-pcie",
        kinds=("H100 PCIe",),
        platform="gpu",
        memory=80 * GIB,
        flops=756e12,
        memory_bandwidth=2000e9,
        interconnect=64e9,
        network=50e9,
        linked=8,
        sources=(_NVIDIA + "h100/",),
    ),
    Chip(
        name="h100",
        kinds=("H100",),
        platform="gpu",
        memory=80 * GIB,
        flops=989e12,
        memory_bandwidth=3350e9,
        interconnect=450e9,
        network=50e9,
        linked=8,
        sources=(_NVIDIA + "h100/", "https://docs.nvidia.com/dgx/dgxh100-user-guide/"),
    ),
    Chip(
        name="a100-40g",
        kinds=("A100-SXM4-40GB", "A100-PCIE-40GB"),
        platform="gpu",
        memory=40 * GIB,
        flops=312e12,
        memory_bandwidth=1555e9,
        interconnect=300e9,
        network=25e9,
        linked=8,
        sources=(_NVIDIA + "a100/", "https://docs.nvidia.com/dgx/dgxa100-user-guide/"),
    ),
    Chip(
        name="a100",
        kinds=("A100",),
        platform="gpu",
        memory=80 * GIB,
        flops=312e12,
        memory_bandwidth=2039e9,
        interconnect=300e9,
        network=25e9,
        linked=8,
        sources=(_NVIDIA + "a100/", "https://docs.nvidia.com/dgx/dgxa100-user-guide/"),
    ),
)


def chip_named(name: str) -> Chip:
    """The chip of a plan; raises `KeyError` for another name."""
    return next(chip for chip in CHIPS if chip.name == name)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that a device's kind names; None where it is not known.

    JAX calls a v5p "TPU v5" and nothing else.
    """
    if device_kind.lower() == "tpu v5":
        return chip_named("v5p")
    return next((chip for chip in CHIPS if any(kind.lower() in device_kind.lower() for kind in chip.kinds)), None)


def chip_count(topology: str) -> int:
    """Chips of `8`, `8x8` or `4x4x4`."""
    return math.prod(int(size) for size in topology.split("x"))
