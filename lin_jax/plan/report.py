"""What a plan says, as lines."""

from collections.abc import Iterable, Sequence

from lin_jax.chips import GIB, Chip
from lin_jax.plan.estimate import State
from lin_jax.plan.times import Times
from lin_jax.train.collectives import Collective

Rows = list[tuple[str, str]]


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Names and values, in two columns."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return [f"{name.ljust(width)}  {value}" for name, value in rows]


def gib(size: int | float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f} GiB"


def state_rows(state: State) -> Rows:
    """What of the state is on a device."""
    trained = _size(state.trained)
    rows = [("trained parameters", trained), ("their gradients", trained), ("optimizer state", _size(state.optimizer))]
    return [*rows, ("frozen parameters", _size(state.frozen))]


def _size(sizes: tuple[int, int]) -> str:
    return f"{sizes[0]:,} bytes a device, {sizes[1]:,} in one copy"


def collective_rows(collectives: Sequence[Collective]) -> Rows:
    """What a device sends in a step, by kind."""
    kinds = list(dict.fromkeys(collective.kind for collective in collectives))
    rows = []
    for kind in kinds:
        own = [collective for collective in collectives if collective.kind == kind]
        times, sent = sum(c.times for c in own), sum(c.times * c.sent for c in own)
        rows.append((f"sent by {kind}", f"{sent:,} bytes a device, in {times:,} exchanges"))
    return rows or [("sent", "nothing")]


def time_rows(chip: Chip, devices: int, times: Times, flops: int, traffic: int, needed: int) -> Rows:
    """The best possible times of a step, and the utilisation that they leave."""
    rows = [
        (
            "time for arithmetic",
            f"{_time(times.compute)}: {flops:.3g} FLOPs on {devices} x {chip.flops / 1e12:.0f} TFLOP/s",
        ),
        ("time for memory", f"{_time(times.memory)}: {gib(traffic)} at {chip.memory_bandwidth / 1e9:.0f} GB/s"),
        ("time for the interconnect", f"{_time(times.interconnect)} at {chip.interconnect / 1e9:.0f} GB/s"),
    ]
    if times.network:
        rows.append(("time for the network", f"{_time(times.network)} at {chip.network / 1e9:.3g} GB/s a chip"))
    mfu = needed / (devices * chip.flops * times.step)
    return [*rows, ("MFU at most", f"{mfu:.1%}, if all of this overlaps ({_time(times.step)} a step)")]


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{1e3 * seconds:.2f} ms"
