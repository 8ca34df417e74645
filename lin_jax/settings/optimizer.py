"""Settings of the optimizer."""

import dataclasses
from typing import Literal

from lin_jax.settings.base import require, require_at_least_zero, require_positive, setting
from lin_jax.settings.typed import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """AdamW and its learning rate."""

    peak_learning_rate: float = setting(7e-4, "learning rate after warmup")
    end_learning_rate: float = setting(0.0, "learning rate that linear and cosine schedules reach after the last step")
    alpha_rate: float = setting(
        1.0,
        "learning rate of alpha, the weight of the grouped branch, as a multiple of the others': alpha weighs a sum "
        "over all earlier tokens, so useful values are small",
    )
    schedule: Literal["linear", "cosine", "constant"] = setting("linear", "course of the learning rate after warmup")
    warmup_steps: int = setting(0, "steps over which the learning rate rises from 0")
    beta1: float = setting(0.9, "decay of the mean of gradients")
    beta2: float = setting(0.999, "decay of the mean of squared gradients")
    epsilon: float = setting(1e-8, "added to the root of the mean of squared gradients")
    weight_decay: float = setting(0.01, "decay of matrices; biases, norms, scales and filters never decay")
    gradient_clip: float = setting(1.0, "largest global norm of the gradient; 0 turns clipping off")
    z_loss: float = setting(0.0, "weight of the squared log of the softmax denominator, added to the loss")

    def _check(self) -> None:
        require_positive(self, "peak_learning_rate", "alpha_rate", "epsilon")
        require_at_least_zero(self, "end_learning_rate", "warmup_steps", "weight_decay", "gradient_clip", "z_loss")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must lie in [0, 1), but is {value}")
