"""NVIDIA GPUs to compile for where there are none: JAX's CUDA plugin is told what they are like."""

import importlib.util
from collections.abc import Sequence

import jax

from lin_jax.chips import Chip

# A part of the attention that is compiled by a library of CUDA, which must be there.
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# No GPU is asked for, and no CUDA libraries are looked for.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


def is_installed() -> bool:
    """Return whether JAX's CUDA plugin is there; CUDA itself need not be."""
    return any(importlib.util.find_spec(name) is not None for name in PLUGINS)


def devices(chip: Chip, count: int) -> Sequence[jax.Device]:
    """Return `count` GPUs in nodes, which need not exist."""
    from jax.experimental import topologies

    nodes = -(-count // chip.linked)
    return topologies.get_topology_desc(
        "", "cuda", target_config=_describe(chip), topology=f"1x{nodes}x{count // nodes}"
    ).devices


def _describe(chip: Chip) -> str:
    """The device as a protocol buffer `GpuTargetConfigProto` in text."""
    gpu = chip.multiprocessors
    assert gpu is not None
    major, minor = gpu.capability
    limits = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "core_count": gpu.count,
        "fpus_per_core": gpu.lanes,
        "shared_memory_per_core": gpu.shared,
        "shared_memory_per_block": 49152,
        "shared_memory_per_block_optin": gpu.shared - 1024,
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": chip.memory,
        "memory_bandwidth": int(chip.memory_bandwidth),
    }
    fields = " ".join(f"{name}: {value}" for name, value in limits.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 8 }} '
        f'device_description_str: "{chip.kind}"'
    )
