"""Which parameters train, and the model that a run trains: with its adapters and heads, frozen parts apart."""

import functools
from collections.abc import Sequence
from typing import Any

from flax import nnx

from lin_jax.experiment import Config
from lin_jax.layers.lora import add_lora
from lin_jax.layers.parameter import Path, Role, roles_by_path
from lin_jax.models.flops import Flops, roles_of
from lin_jax.models.registry import create_model
from lin_jax.models.structure import Structure, make_structure
from lin_jax.tasks.base import Task
from lin_jax.tasks.registry import task_of
from lin_jax.train.workdir import read_settings


def trains(task: Task, path: Path, roles: Sequence[Role]) -> bool:
    """Return whether a parameter trains: adapters and what the task adds always do, teachers never."""
    if path[0] in task.teachers:
        return False
    chosen = {"adapter", *task.config.finetune.train}
    return "all" in chosen or path[0] in task.adds or not chosen.isdisjoint(roles)


def new_parameters(task: Task, model: Any) -> set[Path]:
    """Return the paths of parameters that a model may lack that a run starts from."""
    return {
        path
        for path, roles in roles_by_path(model).items()
        if path[0] in (*task.adds, *task.teachers) or not {"new", "adapter"}.isdisjoint(roles)
    }


def step_flops(config: Config, *, tiled: bool = False) -> Flops:
    """Return the operations for one token of the step that a run of `config` makes; `tiled`: see `Task.flops`."""
    task, roles = task_of(config), roles_of(config.model)
    return task.flops(lambda path: trains(task, path, roles[path]), tiled=tiled)


def structure_of(config: Config, *, teachers: bool = True) -> Structure:
    """Return the model that a run of `config` trains, with the teachers it learns from or without.

    Raises:
        ConfigError: there is no run to read a teacher's settings from.
    """
    task = task_of(config)
    settings = {name: read_settings(path) for name, path in task.teachers.items()} if teachers else {}

    def create(rngs: nnx.Rngs) -> nnx.Module:
        model = create_model(config.model, rngs)
        add_lora(model, config.finetune.lora, rngs)
        task.extend(model, rngs)
        for name, of_teacher in settings.items():
            setattr(model, name, create_model(of_teacher.model, rngs))
        return model

    return make_structure(
        create,
        functools.partial(trains, task),
        frozen_dtype=config.finetune.frozen_dtype,
        keeps_start=task.keeps_start,
        start=task.start,
    )
