"""Timing and printing shared by the benchmarks."""

import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

# Idle threads of one library spin for a moment after its last operation; without a pause the other library pays for it.
PAUSE_SECONDS = 0.005


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of every repeat of one function, in the order in which they were measured."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        """Least seconds."""
        return min(self.seconds)

    def speedup_over(self, other: "Timing") -> float:
        """How many times faster this is than `other`: the median of the ratios of neighbouring repeats.

        Neighbours ran within moments of each other, so a machine that is busy for a while slows both.
        """
        return statistics.median(theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True))

    def best_speedup_over(self, other: "Timing") -> float:
        """The ratio of the least times: what is left of `speedup_over` where other programs disturbed neither."""
        return other.minimum / self.minimum


def time_interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, Timing]:
    """Times functions in turn (a, b, c, a, b, c, ...), after calling each `warmup` times.

    Args:
        functions: name -> function without arguments, whose JAX results are waited for.
        repeats: measured calls of each.
        warmup: calls before, which compile and fill caches.
    """
    for function in functions.values():
        for _ in range(warmup):
            jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(_time_once(function))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _time_once(function: Callable[[], Any]) -> float:
    time.sleep(PAUSE_SECONDS)
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


class Competition:
    """How much of the processor others took since this was made: figures taken beside busy programs mislead."""

    def __init__(self):
        self.start = _processor_seconds()

    def share(self) -> float | None:
        """Part of all cores that other processes or machines on the same hardware used; None where it is unknown."""
        now = _processor_seconds()
        if self.start is None or now is None:
            return None
        (own, busy, total), (own_before, busy_before, total_before) = now, self.start
        return max(0.0, (busy - busy_before) - (own - own_before)) / max(total - total_before, 1e-9)


def _processor_seconds() -> tuple[float, float, float] | None:
    """Seconds of all cores since boot: used by this process, used by all, and altogether."""
    statistics_file = epath.Path("/proc/stat")
    if not statistics_file.exists():
        return None
    ticks = [int(field) for field in statistics_file.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    per_second = os.sysconf("SC_CLK_TCK")
    return time.process_time(), (sum(ticks) - idle) / per_second, sum(ticks) / per_second


def has_torch() -> bool:
    """Whether PyTorch is installed and JAX runs on the CPU, so that both would use the same device."""
    return importlib.util.find_spec("torch") is not None and jax.default_backend() == "cpu"


def describe_machine() -> dict[str, Any]:
    """Device, versions and thread counts of this run."""
    facts: dict[str, Any] = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
    }
    facts |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    if has_torch():
        import torch

        facts |= {"torch": torch.__version__, "torch threads": torch.get_num_threads()}
    return facts


def _processor() -> str:
    information = epath.Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def print_machine(facts: Mapping[str, Any]) -> None:
    """Prints what `describe_machine` found, on one line."""
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)


def percent(share: float | None) -> str:
    """A share as text; unknown is a question mark."""
    return "?" if share is None else f"{share:.0%}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints text cells in aligned columns, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        cells = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), flush=True)


def write_json(path: str | None, result: Mapping[str, Any]) -> None:
    """Writes the result to `path`; None writes nothing."""
    if path is not None:
        epath.Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
