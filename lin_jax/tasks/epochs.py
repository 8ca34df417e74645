"""Epochs of examples as steps."""

import dataclasses
import math

from lin_jax.data.batches import count_batches
from lin_jax.settings.base import require
from lin_jax.settings.train import TrainConfig
from lin_jax.tasks.base import RunSettings


def steps_of_epochs(config: RunSettings, examples: int) -> TrainConfig:
    """Return `config.train` with the steps that its epochs of so many examples come to, if it has any.

    Raises:
        ConfigError: there are fewer than the steps of warmup.
    """
    train, warmup = config.train, config.optimizer.warmup_steps
    if not train.epochs:
        return train
    steps = max(1, math.ceil(train.epochs * count_batches(config.data, examples)))
    require(
        warmup < steps or config.optimizer.schedule == "constant",
        f"optimizer.warmup_steps={warmup} must be smaller than the {steps} steps of train.epochs={train.epochs:g}",
    )
    return dataclasses.replace(train, steps=steps)
