"""Settings of the devices."""

import dataclasses

from lin_jax.settings.base import require, setting
from lin_jax.settings.typed import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Settings):
    """How many devices each parallel axis takes; one of them may be -1, which takes what is left."""

    slice: int = setting(1, "TPU slices, between which only gradients cross the data centre's network", most=2**20)
    data: int = setting(-1, "copies of the model, each with its part of the batch", most=2**20)
    fsdp: int = setting(1, "parts into which parameters, optimizer state and batch are cut", most=2**20)
    tensor: int = setting(1, "parts into which heads, feed-forward layers and vocabulary are cut", most=2**20)
    sequence: int = setting(
        1, "parts into which rows are cut; augmented attention sends only states between them", most=2**20
    )
    rules: tuple[str, ...] = setting(
        (),
        "changes of what cuts what: LOGICAL=MESH+MESH, such as width=fsdp+sequence, or vocabulary= for what is not to "
        "be cut; the table is in lin_jax/train/sharding.py",
    )

    def _check(self) -> None:
        sizes = {name: getattr(self, name) for name in ("slice", "data", "fsdp", "tensor", "sequence")}
        for name, size in sizes.items():
            require(size == -1 or size > 0, f"{name} must be a number of devices or -1, but is {size}")
        require(list(sizes.values()).count(-1) <= 1, "only one mesh axis may be -1")
        for rule in self.rules:
            require("=" in rule, f"rules must look like width=fsdp+sequence, but one is {rule!r}")
