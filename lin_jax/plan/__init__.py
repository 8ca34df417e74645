"""What a training run needs, found without its parameters: the step is compiled for devices that are not there."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.experiment import Config
from lin_jax.plan import target as targets
from lin_jax.plan.compiled import Traced
from lin_jax.plan.estimate import hbm_traffic, layer_tokens, measure_state
from lin_jax.plan.fit import Attempt, Report, attempt
from lin_jax.plan.report import Rows, collective_rows, gib, state_rows, table, time_rows
from lin_jax.plan.search import advice
from lin_jax.plan.times import bound
from lin_jax.settings.base import ConfigError
from lin_jax.tasks.registry import task_of
from lin_jax.train.trainable import step_flops

__all__ = ["plan", "prepare_plan"]


def prepare_plan(config: Config) -> None:
    """Make this process ready for `plan`; call it before anything is computed. Raises `ConfigError`."""
    targets.prepare(targets.parse(config.plan))


def plan(config: Config, report: Report = lambda line: None) -> str:
    """A table of what the step of `config` needs on the devices of `config.plan`.

    Args:
        config: all settings.
        report: is called with lines on the progress.

    Raises:
        ConfigError: the settings do not fit the devices; or the step does not fit their memory, with what would.
    """
    target = targets.parse(config.plan)
    planned = task_of(config).planned()
    assert isinstance(planned, Config)
    made = attempt(target, planned, report)
    text = "\n".join(_describe(made))
    if made.fits:
        return text
    report(text)
    assert made.limit is not None
    over = f"{gib(made.needed)} of {gib(made.limit)} a device, {gib(made.needed - made.limit)} too much ({made.how})"
    raise ConfigError(f"plan={target.name}: does not fit, {over}; {advice(target, planned, report)}")


def _describe(made: Attempt) -> list[str]:
    traced, config = made.traced, made.traced.parts.config
    tokens = config.data.batch_size * traced.parts.task.row_tokens
    cut = [f"{name} {size}" for name, size in traced.parts.mesh.shape.items() if size > 1]
    flops = step_flops(config, tiled=made.tiled).needed * tokens
    rows = [
        ("parameters", f"{_count(jax.eval_shape(traced.parts.structure.initialise, jnp.uint32(0))[0]):,}"),
        ("trained", f"{_count(traced.state.parameters):,}"),
        *state_rows(measure_state(traced)),
        *_memory_rows(made),
        *_program_rows(made),
    ]
    told = f"{tokens:,} tokens and {flops:.3g} FLOPs a step"
    return [f"{made.target.name}: {', '.join(cut) or 'one device'}; {told}", *table(rows)]


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _memory_rows(made: Attempt) -> Rows:
    rows, step = [], made.step
    if made.traced.parts.config.finetune.trains_model:  # Heads alone send nothing back into the model.
        rows.append(("layer inputs kept for the backward pass", _layer_inputs(made.traced)))
    if step is not None and made.compiled:
        rows.append(("temporaries of the compiled step", f"{step.temporaries:,} bytes a device"))
        rows.append(("the program", f"{step.code:,} bytes a device"))
    elif step is not None:
        rows.append(("activations by formula", f"{made.needed - step.arguments:,} bytes a device"))
    return [*rows, ("altogether", _altogether(made))]


def _layer_inputs(traced: Traced) -> str:
    """What rematerialisation keeps: the features that enter every layer, for the rows of a microbatch."""
    model = traced.parts.config.model
    size = layer_tokens(traced) * model.width * np.dtype(model.dtype).itemsize
    return f"{size:,} bytes a device, with model.remat=full"


def _altogether(made: Attempt) -> str:
    if made.limit is None:
        return f"{made.needed:,} bytes a device"
    share = f"{gib(made.needed)} of {gib(made.limit)} a device"
    return f"{share}: {'fits' if made.fits else 'does not fit'} ({made.how})"


def _program_rows(made: Attempt) -> Rows:
    """What the compiled step calls and exchanges, and how fast it can be."""
    step, chip, config = made.step, made.target.chip, made.traced.parts.config
    if step is None:
        return []
    rows = [("kernels", ", ".join(step.kernels) or "none but XLA's own"), *collective_rows(step.collectives)]
    if chip is None:
        return rows
    tokens = config.data.batch_size * made.traced.parts.task.row_tokens
    per_token = step_flops(config, tiled=made.tiled)
    traffic, count = hbm_traffic(made.traced, flash=made.tiled), made.target.count
    linked = count // made.target.slices if chip.platform == "tpu" else chip.linked
    computed = per_token.computed * tokens
    times = bound(chip, count, linked, flops=computed, traffic=traffic, collectives=step.collectives)
    return [*rows, *time_rows(chip, count, times, computed, traffic, per_token.needed * tokens)]
