"""What a training run needs, found without its parameters: the step is compiled for devices that are not there."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.config import Config, ConfigError
from lin_jax.train.plan import target as targets
from lin_jax.train.plan.compiled import Step, TooLarge, Traced, compile_step, trace
from lin_jax.train.plan.estimate import (
    estimate_activations,
    hbm_traffic,
    measure_state,
    microbatch_tokens,
    softmax_is_tiled,
)
from lin_jax.train.plan.report import collective_rows, gib, state_rows, table, time_rows
from lin_jax.train.plan.suggest import larger_topologies, smaller
from lin_jax.train.plan.target import Target, prepare
from lin_jax.train.plan.times import bound
from lin_jax.train.trainable import step_flops

__all__ = ["plan", "prepare_plan"]

Report = Callable[[str], None]

# Of a GPU's memory JAX takes at most this part, with XLA_PYTHON_CLIENT_MEM_FRACTION set to it; CUDA needs the rest.
GPU_FRACTION = 0.92
# Compilations that a plan which does not fit may take to find one that does.
TRIES = 3


def prepare_plan(config: Config) -> None:
    """Make this process ready for `plan`; call it before anything is computed. Raises `ConfigError`."""
    prepare(targets.parse(config.plan))


def plan(config: Config, report: Report = lambda line: None) -> str:
    """A table of what the step of `config` needs on the devices of `config.plan`.

    Args:
        config: all settings.
        report: is called with lines on the progress.

    Raises:
        ConfigError: the settings do not fit the devices; or the step does not fit their memory, with what would.
    """
    return _Plan(targets.parse(config.plan), report).run(config)


@dataclasses.dataclass(frozen=True)
class _Fit:
    """What one configuration takes on a device, in bytes, and what there is; `how` says how that is known."""

    needed: int
    limit: int | None
    step: Step | None
    how: str

    @property
    def fits(self) -> bool:
        return self.step is not None and (self.limit is None or self.needed <= self.limit)


class _Plan:
    def __init__(self, target: Target, report: Report):
        self._target, self._report = target, report
        self._tiled = target.chip.platform if target.chip else "cpu"

    def run(self, config: Config) -> str:
        traced = trace(config, targets.devices(self._target))
        fit = self._try(traced)
        text = "\n".join(self._describe(traced, fit))
        if fit.fits:
            return text
        self._report(text)
        raise ConfigError(self._refusal(config, traced, fit))

    def _try(self, traced: Traced) -> _Fit:
        """Compile; without a compiler for the chip, compile for this CPU and estimate the activations."""
        chip = self._target.chip
        state = measure_state(traced)
        limit = None if chip is None else int(chip.memory * (GPU_FRACTION if chip.platform == "gpu" else 1))
        if limit is not None and state.own + state.trained[0] > limit:
            return _Fit(state.own + state.trained[0], limit, None, "parameters, gradients and optimizer alone")
        self._report(f"compiling for {self._target.name} ...")
        made = compile_step(traced)
        if isinstance(made, TooLarge):
            return _Fit(made.bytes, made.limit, None, f"compiled in {made.seconds:.0f} s")
        if chip is None or self._target.compiles:
            return _Fit(made.bytes, limit, made, f"compiled in {made.seconds:.0f} s")
        activations = estimate_activations(traced, flash=self._flash(traced.parts.config)).bytes
        return _Fit(made.arguments + activations, limit, made, "activations by formula, not compiled for the chip")

    def _flash(self, config: Config) -> bool:
        return softmax_is_tiled(config, self._tiled)

    def _describe(self, traced: Traced, fit: _Fit) -> list[str]:
        config, chip, count = traced.parts.config, self._target.chip, self._target.count
        per_token = step_flops(config)
        tokens = config.data.batch_size * config.data.sequence_length
        cut = [f"{name} {size}" for name, size in traced.parts.mesh.shape.items() if size > 1]
        flops = f"{tokens:,} tokens and {per_token.needed * tokens:.3g} FLOPs a step"
        rows = [
            ("parameters", f"{_count(_shapes(traced)):,}"),
            ("trained", f"{_count(traced.state.parameters):,}"),
            *state_rows(measure_state(traced)),
            *self._memory_rows(traced, fit),
        ]
        if fit.step is not None:
            rows += collective_rows(fit.step.collectives)
            if chip is not None:
                computed, traffic = per_token.computed * tokens, hbm_traffic(traced, flash=self._flash(config))
                per_slice = count // self._target.slices if chip.platform == "tpu" else chip.linked
                exchanged = fit.step.collectives
                times = bound(chip, count, per_slice, flops=computed, traffic=traffic, collectives=exchanged)
                rows += time_rows(chip, count, times, computed, traffic, per_token.needed * tokens)
        return [f"{self._target.name}: {', '.join(cut) or 'one device'}; {flops}", *table(rows)]

    def _memory_rows(self, traced: Traced, fit: _Fit) -> list[tuple[str, str]]:
        rows = []
        if traced.parts.config.finetune.trains_model:  # Heads alone send nothing back into the model.
            rows.append(("layer inputs kept for the backward pass", _layer_inputs(traced)))
        if fit.step is not None and fit.limit is not None and not self._target.compiles:
            rows.append(("activations by formula", f"{fit.needed - fit.step.arguments:,} bytes a device"))
        elif fit.step is not None:
            rows.append(("temporaries of the compiled step", f"{fit.step.temporaries:,} bytes a device"))
            rows.append(("the program", f"{fit.step.code:,} bytes a device"))
        rows.append(("altogether", _altogether(fit)))
        return rows

    def _refusal(self, config: Config, traced: Traced, fit: _Fit) -> str:
        """One line on what is too large and what would fit, which has been tried."""
        assert fit.limit is not None
        over = f"{gib(fit.needed)} of {gib(fit.limit)} a device, {gib(fit.needed - fit.limit)} too much ({fit.how})"
        return f"plan={self._target.name}: does not fit, {over}; {self._advice(config)}"

    def _advice(self, config: Config) -> str:
        found = self._smaller(config) or self._larger(config)
        return found or "nothing that was tried makes it fit"

    def _smaller(self, config: Config) -> str | None:
        """Changed settings with which it fits: those of the least memory by formula, then fewer changes."""
        chip = self._target.chip
        assert chip is not None
        tried = 0
        for suggestion in smaller(config, self._target.count):
            if tried == TRIES:
                break
            traced = trace(suggestion.config, targets.devices(self._target))
            flash = self._flash(suggestion.config)
            if measure_state(traced).own + estimate_activations(traced, flash=flash).bytes > 1.3 * chip.memory:
                continue
            tried += 1
            told = " ".join(suggestion.settings)
            self._report(f"trying {told}")
            fit = self._try(traced)
            if fit.fits:
                return f"it does with {told}: {gib(fit.needed)} ({fit.how})"
        return None

    def _larger(self, config: Config) -> str | None:
        """The smallest topology of the same chip that has room."""
        chip = self._target.chip
        assert chip is not None
        cut = dataclasses.replace(config.mesh, data=1, fsdp=-1)
        for name in larger_topologies(chip, self._target.count):
            other = _Plan(targets.parse(name), self._report)
            wider = dataclasses.replace(config, mesh=cut, plan=name)
            for suggestion in (None, *smaller(wider, other._target.count)):
                candidate = suggestion.config if suggestion else wider
                told = " ".join((f"--config.plan={name}", "--config.mesh.data=1", "--config.mesh.fsdp=-1"))
                told += " " + " ".join(suggestion.settings) if suggestion else ""
                if other._has_room(candidate):
                    self._report(f"trying {told}")
                    fit = other._try(trace(candidate, targets.devices(other._target)))
                    if fit.fits:
                        return f"no setting makes it fit there, but it does with {told}: {gib(fit.needed)} ({fit.how})"
        return None

    def _has_room(self, config: Config) -> bool:
        try:
            traced = trace(config, targets.devices(self._target))
        except ConfigError:
            return False
        needed = measure_state(traced).own + estimate_activations(traced, flash=self._flash(config)).bytes
        return self._target.chip is not None and needed <= self._target.chip.memory


def _altogether(fit: _Fit) -> str:
    if fit.limit is None:
        return f"{fit.needed:,} bytes a device"
    share = f"{gib(fit.needed)} of {gib(fit.limit)} a device"
    return f"{share}: {'fits' if fit.fits else 'does not fit'} ({fit.how})"


def _shapes(traced: Traced) -> Any:
    return jax.eval_shape(traced.parts.structure.initialise, jnp.uint32(0))[0]


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _layer_inputs(traced: Traced) -> str:
    """What rematerialisation keeps: the features that enter every layer, for the rows of a microbatch."""
    model = traced.parts.config.model
    size = model.depth * microbatch_tokens(traced) * model.width * np.dtype(model.dtype).itemsize
    return f"{size:,} bytes a device, with model.remat=full"
