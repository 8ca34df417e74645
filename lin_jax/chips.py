"""What accelerators can do, from their makers' public figures: the one table that everything here reads.

Of bandwidths that makers give for both directions, half is what a chip can send. Where two pages of a maker differ in
rounding (H100: 3.35 TB/s; v6e: 1638 GB/s, elsewhere 1640), the data sheet of the chip alone is followed.
"""

import dataclasses
import math
import re
from typing import Literal

GIB = 2**30

_CLOUD = "https://cloud.google.com/tpu/docs/"
_BOOK = "https://jax-ml.github.io/scaling-book/tpus/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_DGX = "https://docs.nvidia.com/dgx/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiprocessors:
    """What CUDA's driver says of the processors of a GPU.

    Attributes:
        capability: major and minor version of the instruction set.
        count: multiprocessors.
        lanes: float32 lanes of each.
        shared: bytes of shared memory of each; a block of threads may have 1 KiB less.
        cache: bytes between them and the memory of the device.
        clock: highest, in GHz.
    """

    capability: tuple[int, int]
    count: int
    lanes: int
    shared: int
    cache: int
    clock: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of device.

    Attributes:
        name: in `--config.plan`.
        kind: JAX's `device_kind` of it.
        parts: what other `device_kind`s of it contain; of several chips that match, the first of `CHIPS` is meant.
        platform: as JAX names it.
        memory: bytes of HBM.
        flops: dense bf16 operations a second.
        memory_bandwidth: bytes a second between HBM and the chip.
        interconnect: bytes a second that one chip can send to others of its slice (ICI) or node (NVLink), all links
            together.
        network: bytes a second that one chip can send beyond its slice or node.
        linked: most chips that the interconnect joins.
        sources: pages that the figures are from.
        topologies: of TPUs, sizes in which slices come, smallest first; _CLOUD has them all.
        multiprocessors: of GPUs; None where nothing can be compiled for the chip without having it.
    """

    name: str
    kind: str
    parts: tuple[str, ...]
    platform: Literal["tpu", "gpu"]
    memory: int
    flops: float
    memory_bandwidth: float
    interconnect: float
    network: float
    linked: int
    sources: tuple[str, ...]
    topologies: tuple[str, ...] = ()
    multiprocessors: Multiprocessors | None = None


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_A100 = Multiprocessors(capability=(8, 0), count=108, lanes=64, shared=164 << 10, cache=40 << 20, clock=1.41)
_H100 = Multiprocessors(capability=(9, 0), count=132, lanes=128, shared=228 << 10, cache=50 << 20, clock=1.98)

CHIPS = (
    Chip(
        name="v6e",
        kind="TPU v6 lite",
        parts=("v6 lite", "v6e"),
        platform="tpu",
        memory=32 * GIB,
        flops=918e12,
        memory_bandwidth=1638e9,
        interconnect=400e9,
        network=12.5e9,
        linked=256,
        sources=(_CLOUD + "v6e",),
        topologies=_FLAT,
    ),
    Chip(
        name="v5p",
        kind="TPU v5",
        parts=("v5p",),
        platform="tpu",
        memory=95 * GIB,
        flops=459e12,
        memory_bandwidth=2765e9,
        interconnect=600e9,
        network=6.25e9,
        linked=6144,
        sources=(_CLOUD + "v5p",),
        topologies=_CUBES,
    ),
    Chip(
        name="v5e",
        kind="TPU v5 lite",
        parts=("v5 lite", "v5e"),
        platform="tpu",
        memory=16 * GIB,
        flops=197e12,
        memory_bandwidth=819e9,
        interconnect=200e9,
        network=3.125e9,
        linked=256,
        sources=(_CLOUD + "v5e",),
        topologies=_FLAT,
    ),
    Chip(
        name="v4",
        kind="TPU v4",
        parts=("v4",),
        platform="tpu",
        memory=32 * GIB,
        flops=275e12,
        memory_bandwidth=1200e9,
        interconnect=270e9,
        network=6.25e9,
        linked=4096,
        sources=(_CLOUD + "v4", _BOOK),
        topologies=_CUBES,
    ),
    Chip(
        name="h200",
        kind="NVIDIA H200",
        parts=("H200",),
        platform="gpu",
        memory=140 * GIB,
        flops=989e12,
        memory_bandwidth=4800e9,
        interconnect=450e9,
        network=50e9,
        linked=8,
        sources=(_NVIDIA + "h200/", _DGX + "dgxh100-user-guide/"),
        multiprocessors=_H100,
    ),
    Chip(
        name="h100-pcie",
        kind="NVIDIA H100 PCIe",
        parts=("H100 PCIe",),
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
        kind="NVIDIA H100 80GB HBM3",
        parts=("H100",),
        platform="gpu",
        memory=80 * GIB,
        flops=989e12,
        memory_bandwidth=3350e9,
        interconnect=450e9,
        network=50e9,
        linked=8,
        sources=(_NVIDIA + "h100/", _DGX + "dgxh100-user-guide/"),
        multiprocessors=_H100,
    ),
    Chip(
        name="a100-40g",
        kind="NVIDIA A100-SXM4-40GB",
        parts=("A100-SXM4-40GB", "A100-PCIE-40GB"),
        platform="gpu",
        memory=40 * GIB,
        flops=312e12,
        memory_bandwidth=1555e9,
        interconnect=300e9,
        network=25e9,
        linked=8,
        sources=(_NVIDIA + "a100/", _DGX + "dgxa100-user-guide/"),
        multiprocessors=_A100,
    ),
    Chip(
        name="a100",
        kind="NVIDIA A100-SXM4-80GB",
        parts=("A100",),
        platform="gpu",
        memory=80 * GIB,
        flops=312e12,
        memory_bandwidth=2039e9,
        interconnect=300e9,
        network=25e9,
        linked=8,
        sources=(_NVIDIA + "a100/", _DGX + "dgxa100-user-guide/"),
        multiprocessors=_A100,
    ),
)


def chip_named(name: str) -> Chip:
    """Return the chip of a plan; raises `KeyError` for another name."""
    return {chip.name: chip for chip in CHIPS}[name]


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip that a device's kind names; None where it is not known."""
    named = {chip.kind: chip for chip in CHIPS}
    parts = (chip for chip in CHIPS if any(part.lower() in device_kind.lower() for part in chip.parts))
    return named.get(device_kind) or next(parts, None)


def chip_count(topology: str) -> int:
    """Return the chips of `8`, `8x8` or `4x4x4`."""
    return math.prod(int(size) for size in topology.split("x"))


def is_plan(text: str) -> bool:
    """Return whether `text` names devices: cpu:8, h100:8, v5e:8x8, v5p:4x4x4 or, for two slices, 2*v5e:8x8."""
    tpus = "|".join(chip.name for chip in CHIPS if chip.topologies)
    gpus = "|".join(chip.name for chip in CHIPS if chip.multiprocessors)
    pattern = rf"(cpu|{gpus}):[1-9]\d*|([1-9]\d*\*)?({tpus}):[1-9]\d*(x[1-9]\d*){{1,2}}"
    return re.fullmatch(pattern, text) is not None
