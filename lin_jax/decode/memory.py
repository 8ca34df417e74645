"""Whether what is asked for can be allocated at all, found out before it is tried."""

import os
from collections.abc import Callable
from typing import Any

import jax

from lin_jax.settings.base import require


def bytes_of(make: Callable[[], Any]) -> int:
    """Return the bytes of the arrays that `make` would give, without making them."""
    sizes: list[int] = []

    def trace() -> None:
        sizes.extend(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(make()))

    jax.eval_shape(trace)
    return sum(sizes)


def require_memory(needed: int, what: str, fix: str) -> None:
    """Raise `ConfigError` if `what`, of so many bytes, is more than the memory of all devices together."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    there = sum(limits) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    require(needed <= there, f"{what} would take {needed / 1e9:,.1f} GB, but there are {there / 1e9:,.1f} GB: {fix}")
