"""Descriptions of NVIDIA GPUs that are not here, to compile for: `benchmarks.aot` uses them.

Needs jax-cuda12-plugin and jax-cuda12-pjrt of JAX's version (`pip install --no-deps jax-cuda12-plugin
jax-cuda12-pjrt`), and neither CUDA's libraries nor a GPU. The figures are those that the driver reports of these
devices; the compiler needs them to choose instructions and to refuse what does not fit. One target a process: a second
one in the same process is compiled for the first.
"""

import dataclasses
import importlib.util
import os
from typing import Any


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A device as the driver describes it.

    Attributes:
        name: what JAX calls its kind.
        capability: major and minor version of the instruction set.
        multiprocessors: their number.
        lanes: float32 lanes of a multiprocessor.
        shared_bytes: shared memory of a multiprocessor; a program may have 1 KiB less.
        memory_bytes, bandwidth, cache_bytes: device memory, its bytes a second, and the cache before it.
        clock_ghz: highest clock.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    lanes: int
    shared_bytes: int
    memory_bytes: int
    bandwidth: int
    cache_bytes: int
    clock_ghz: float


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 << 10, 80 << 30, 2039 * 10**9, 40 << 20, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 << 10, 80 << 30, 3352 * 10**9, 50 << 20, 1.98),
}


def available() -> bool:
    """Whether the compiler is installed."""
    return all(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_plugins.xla_cuda12"))


def prepare() -> None:
    """Lets JAX load the CUDA plugin without a GPU; before JAX starts its backends."""
    os.environ.update(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="-1", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1")


def device(target: str) -> Any:
    """The device to compile for."""
    from jax.experimental import topologies

    description = _description(GPUS[target])
    return topologies.get_topology_desc(target, "cuda", target_config=description, topology="1x1x1").devices[0]


def _description(gpu: Gpu) -> str:
    """The text form of XLA's GpuTargetConfigProto."""
    major, minor = gpu.capability
    return f"""
      platform_name: "CUDA"
      device_description_str: "{gpu.name}"
      dnn_version_info {{ major: 9 minor: 8 }}
      runtime_version {{ major: 12 minor: 8 }}
      gpu_device_info {{
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        core_count: {gpu.multiprocessors}
        fpus_per_core: {gpu.lanes}
        clock_rate_ghz: {gpu.clock_ghz}
        device_memory_size: {gpu.memory_bytes}
        memory_bandwidth: {gpu.bandwidth}
        l2_cache_size: {gpu.cache_bytes}
        shared_memory_per_core: {gpu.shared_bytes}
        shared_memory_per_block_optin: {gpu.shared_bytes - 1024}
        shared_memory_per_block: 49152
        registers_per_core_limit: 65536
        registers_per_block_limit: 65536
        threads_per_core_limit: 2048
        threads_per_block_limit: 1024
        threads_per_warp: 32
        block_dim_limit_x: 2147483647
        block_dim_limit_y: 65535
        block_dim_limit_z: 65535
      }}
    """
