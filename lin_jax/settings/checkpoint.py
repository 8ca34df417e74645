"""Settings of checkpoints."""

import dataclasses

from lin_jax.settings.base import require_at_least_zero, require_positive, setting
from lin_jax.settings.typed import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings):
    """When the state of a run is saved; it is always saved at the end and on SIGTERM."""

    every: int = setting(500, "steps between checkpoints; 0 saves only at the end")
    keep: int = setting(2, "newest checkpoints that are kept")
    keep_best: bool = setting(True, "also keep the checkpoint with the lowest validation loss")

    def _check(self) -> None:
        require_at_least_zero(self, "every")
        require_positive(self, "keep")
