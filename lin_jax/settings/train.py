"""Settings of the training loop."""

import dataclasses

from lin_jax.settings.base import require_at_least_zero, require_positive, setting
from lin_jax.settings.typed import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """The training loop."""

    steps: int = setting(1000, "updates of the parameters")
    epochs: float = setting(
        0.0, "times that every example is learned from; 0: as often as steps says, which counts only then", most=2**20
    )
    microbatches: int = setting(
        1, "parts into which a batch is cut to save memory; their gradients are summed", most=2**20
    )
    seed: int = setting(0, "seed of the initial parameters and of dropout", most=2**32 - 1)
    loss_chunk: int = setting(1024, "positions whose logits are in memory at a time, for each device", most=2**24)
    log_every: int = setting(10, "steps between lines of metrics")
    evaluate_every: int = setting(250, "steps between evaluations; 0 evaluates only at the end")
    evaluate_batches: int = setting(20, "batches in an evaluation; 0 takes the whole validation split")
    max_skipped: int = setting(50, "steps in a row with a non-finite gradient after which training stops")

    def _check(self) -> None:
        require_positive(self, "steps", "microbatches", "loss_chunk", "log_every", "max_skipped")
        require_at_least_zero(self, "epochs", "evaluate_every", "evaluate_batches", "seed")
