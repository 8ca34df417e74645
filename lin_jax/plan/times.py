"""How fast a step can be at best: what arithmetic, memory and interconnect each allow."""

import dataclasses
from collections.abc import Sequence

from lin_jax.chips import Chip
from lin_jax.train.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that a step takes at least, each as if it were the only limit; `network` is between slices or nodes."""

    compute: float
    memory: float
    interconnect: float
    network: float

    @property
    def step(self) -> float:
        """Where all of them overlap perfectly."""
        return max(self.compute, self.memory, self.interconnect, self.network)


def bound(
    chip: Chip, devices: int, per_slice: int, *, flops: int, traffic: int, collectives: Sequence[Collective]
) -> Times:
    """The times of a step.

    Args:
        chip: every device.
        devices: their number.
        per_slice: neighbours in the numbering that the interconnect joins; exchanges beyond them take the network.
        flops: operations of all devices together.
        traffic: bytes between memory and one chip.
        collectives: that every device takes part in.
    """
    beyond = sum(c.times * sent_beyond(c, per_slice) for c in collectives)
    within = sum(c.times * c.sent for c in collectives)
    return Times(
        compute=flops / (devices * chip.flops),
        memory=traffic / chip.memory_bandwidth,
        interconnect=max(within - beyond, 0) / chip.interconnect,
        network=beyond / chip.network,
    )


def sent_beyond(collective: Collective, per_slice: int) -> float:
    """Bytes of one exchange that a device sends out of its slice: of a ring, those that the slice's members share."""
    slices = max(len({member // per_slice for member in group}) for group in collective.groups)
    if slices == 1:
        return 0.0
    members = max(map(len, collective.groups))
    # Inside, members // slices devices each hold a part; between slices they exchange theirs at the same time.
    own = collective.size * slices // members
    share = own * (slices - 1) / slices
    return 2 * share if collective.kind == "all-reduce" else share
