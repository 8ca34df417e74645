"""What a compiled program sends between devices, read from its text: nothing needs to run."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
# Layouts may hold parentheses, `{1,0:T(8,128)(2,1)}`, and tell nothing of sizes.
_LAYOUT = re.compile(r"\{[^{}]*\}")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[^=]*?\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
# TPUs work through one exchange in steps, each beside other work and with the same channel.
_STEP = re.compile(r'channel_id=(\d+), .*chain_id="\d+"')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_LIMIT = re.compile(r" s32\[\](?:\{[^ ]*\})? constant\((\d+)\)")
_DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")
_NAME = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One instruction that moves data between devices.

    Attributes:
        kind: one of `KINDS`.
        size: bytes of the array before the exchange on one device, or after it, whichever is larger.
        groups: devices that exchange with each other, numbered as in the program; for collective-permute the pairs
            (from, to).
        times: how often it runs in one execution of the program; in a loop whose length the text does not tell, once
            for each time that the loop is reached.
        name: where in the traced function it comes from.
    """

    kind: str
    size: int
    groups: tuple[tuple[int, ...], ...]
    times: int
    name: str

    @property
    def sent(self) -> int:
        """Bytes that a device sends each time, at most, by the usual ring."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.size
        members = max(map(len, self.groups))
        ring = self.size * (members - 1) // members
        return 2 * ring if self.kind == "all-reduce" else ring


def find_collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, `jax.jit(f).lower(...).compile().as_text()`, in the order of the text.

    Exchanges among groups of one device, which move nothing, are left out. One that is started and finished apart
    counts once.
    """
    computations, entry = _computations(text)
    times = _times(computations, entry)
    computations = _without_steps(computations)
    devices = math.prod(int(count) for count in _DEVICES.findall(text.partition("\n")[0]))
    return [
        found._replace(kind="reduce-scatter") if name.startswith("all-reduce-scatter") else found
        for name, lines in computations.items()
        for line in lines
        if times[name] and (found := _collective(line, times[name], devices)) is not None
    ]


def sent_bytes(collectives: Sequence[Collective]) -> dict[str, int]:
    """Bytes that a device sends in one execution, at most, by kind."""
    total: dict[str, int] = {}
    for collective in collectives:
        total[collective.kind] = total.get(collective.kind, 0) + collective.times * collective.sent
    return total


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of every computation, and the name of the one that is called first."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return computations, entry


def _without_steps(computations: dict[str, list[str]]) -> dict[str, list[str]]:
    """The computations with every exchange that takes several steps at its first step alone."""
    seen: set[str] = set()
    kept: dict[str, list[str]] = {}
    for name, lines in computations.items():
        kept[name] = []
        for line in lines:
            step = _STEP.search(line)
            if step is None or step[1] not in seen:
                kept[name].append(line)
            if step:
                seen.add(step[1])
    return kept


def _times(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs. Callers stand behind what they call, so the text is read backwards."""
    times = dict.fromkeys(computations, 0)
    times[entry] = 1
    for name in reversed(computations):
        for line in computations[name]:
            for called, count in _calls(line, computations):
                if called in times:
                    times[called] += times[name] * count
    return times


def _calls(line: str, computations: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """What an instruction calls, and how often."""
    found = _INSTRUCTION.match(_LAYOUT.sub("", line.partition(", metadata=")[0]))
    operation = found[2] if found else ""
    if operation.endswith(("-done", "-update")):  # They name what `-start` called.
        return
    for role, called in _CALLED.findall(line):
        yield called, _trips(line, computations) if role == "body" else 1
    for listed in _BRANCHES.findall(line):
        for called in listed.split(","):
            yield called.strip().lstrip("%"), 1


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop turns: as noted, or the only number that its condition has, as loops count from 0."""
    noted, condition = _TRIPS.search(line), _CONDITION.search(line)
    if noted:
        return int(noted[1])
    lines = computations.get(condition[1], []) if condition else []
    limits = [int(found[1]) for line in lines if (found := _LIMIT.search(line))]
    return limits[0] if len(limits) == 1 and any("direction=LT" in line for line in lines) else 1


def _collective(line: str, times: int, devices: int) -> Collective | None:
    found = _INSTRUCTION.match(_LAYOUT.sub("", line))
    kind = found[2].removesuffix("-start") if found else ""
    if found is None or kind not in KINDS:
        return None
    groups = _groups(line) or (tuple(range(devices)),)
    if kind != "collective-permute" and max(map(len, groups)) == 1:
        return None
    size = _size(kind, found[1], max(map(len, groups)), started=found[2] != kind)
    name = _NAME.search(line)
    return Collective(kind, size, groups, times, name[1] if name else "")


def _size(kind: str, result: str, members: int, *, started: bool) -> int:
    """Bytes of the larger of what goes in and what comes out; `-start` has both in its result."""
    total = sum(
        math.prod(int(size) for size in sizes.split(",") if size) * _itemsize(element)
        for element, sizes in _ARRAY.findall(result)
        if sizes or not started  # Scalars beside them are handles.
    )
    if kind in ("all-gather", "reduce-scatter") and started:
        return total * members // (members + 1)
    if kind == "reduce-scatter":
        return total * members
    return total // 2 if started and kind != "all-reduce" else total


def _itemsize(kind: str) -> int:
    """Bytes of an element of a type of HLO: f32, bf16, s8, pred, f8e4m3fn, ..."""
    if kind.startswith("f8"):
        return 1
    bits = re.search(r"\d+", kind)
    return -(-int(bits[0]) // 8) if bits else 1


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    """The groups or pairs of an instruction: listed, as a reshaped and transposed range, or as axes of a mesh."""
    listed = _LISTED.search(line)
    if listed:
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    mesh = _MESH.search(line)
    if mesh:
        return _along_axes(*mesh.groups())
    iota = _IOTA.search(line)
    return tuple(map(tuple, _range(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist())) if iota else ()


def _along_axes(axes: str, shape: str | None, order: str | None, along: str) -> tuple[tuple[int, ...], ...]:
    """Groups along some axes of a mesh: `'a'=2,'b'=4` and `'a'` or, for a part of an axis, `'b':(2)2`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    parts: dict[str, tuple[int, int, int]] = {name: (size, 1, 1) for name, size in sizes.items()}
    for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", along):
        inner = int(size or sizes[name])
        parts[name] = (int(before or 1), inner, sizes[name] // (int(before or 1) * inner))
    devices = _range(shape or str(math.prod(sizes.values())), order).reshape(
        [x for part in parts.values() for x in part]
    )
    grouped = range(1, devices.ndim, 3)
    groups = np.moveaxis(devices, grouped, range(-len(grouped), 0))
    return tuple(map(tuple, groups.reshape(-1, math.prod(part[1] for part in parts.values())).tolist()))


def _range(shape: str, order: str | None) -> np.ndarray:
    """The numbers of devices in their order, reshaped and transposed."""
    sizes = _numbers(shape)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(order) if order else None)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
