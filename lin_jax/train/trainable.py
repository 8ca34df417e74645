"""Which parameters train, and the model that a run trains: with its adapters and heads, frozen parts apart."""

import functools
from collections.abc import Callable

from flax import nnx

from lin_jax.experiment import Config
from lin_jax.layers.lora import ADAPTER, add_lora
from lin_jax.models.flops import Flops
from lin_jax.models.registry import create_model
from lin_jax.models.structure import Path, Structure, make_structure
from lin_jax.tasks.base import Task
from lin_jax.tasks.registry import task_of

# Parameters that linearized attention has and softmax attention does not.
NEW = ("alpha", "filter", "local_factor")

# Groups of `finetune.train`: whether a parameter belongs to one, by the parts of its path.
GROUPS: dict[str, Callable[[Path], bool]] = {
    "all": lambda path: True,
    "new": lambda path: path[-1] in NEW,
    "norm": lambda path: any(part.endswith("norm") for part in path),
    "embedding": lambda path: path[0].endswith("embedding"),
    "attention": lambda path: bool({"attention", "query_key_value", "mixing"} & set(path)) or "output" in path,
    "feed_forward": lambda path: bool({"feed_forward", "up", "down"} & set(path)),
    "head": lambda path: path[0] in ("logits", "score"),
}


def trains(task: Task, path: Path) -> bool:
    """Return whether the parameter at `path` trains: adapters and what the task adds always do."""
    groups = task.config.finetune.train
    return ADAPTER in path or path[0] in task.adds or any(GROUPS[group](path) for group in groups)


def is_new(task: Task, path: Path) -> bool:
    """Return whether a model that a run starts from may lack the parameter at `path`."""
    return path[-1] in NEW or ADAPTER in path or path[0] in task.adds


def step_flops(config: Config, *, tiled: bool = False) -> Flops:
    """Return the operations for one token of the step that a run of `config` makes; `tiled`: see `Task.flops`."""
    task = task_of(config)
    return task.flops(functools.partial(trains, task), tiled=tiled)


def structure_of(config: Config) -> Structure:
    """Return the model that a run of `config` trains."""
    task = task_of(config)

    def create(rngs: nnx.Rngs) -> nnx.Module:
        model = create_model(config.model, rngs)
        add_lora(model, config.finetune.lora, rngs)
        task.extend(model, rngs)
        return model

    return make_structure(
        create,
        functools.partial(trains, task),
        frozen_dtype=config.finetune.frozen_dtype,
        keeps_start=task.keeps_start,
        start=task.start,
    )
