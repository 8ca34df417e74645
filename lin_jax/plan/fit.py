"""Whether a step fits the memory of its target: compiled for the chip, or by formula where there is no compiler."""

import dataclasses
from collections.abc import Callable

from lin_jax.chips import Chip
from lin_jax.experiment import Config
from lin_jax.plan import target as targets
from lin_jax.plan.compiled import Step, TooLarge, Traced, compile_step, trace
from lin_jax.plan.estimate import estimate_activations, measure_state, softmax_is_tiled
from lin_jax.plan.target import Target

Report = Callable[[str], None]

# Of a GPU's memory JAX takes at most this part, with XLA_CLIENT_MEM_FRACTION set to it; CUDA needs the rest.
GPU_FRACTION = 0.92


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What a configuration takes on each device of a target.

    Attributes:
        target: the devices.
        traced: the run.
        needed: bytes on a device.
        limit: what there is; None for virtual devices.
        step: the compiled step; None if there is none, as it is too large.
        compiled: whether by a compiler for the chip.
        how: how `needed` is known.
    """

    target: Target
    traced: Traced
    needed: int
    limit: int | None
    step: Step | None
    compiled: bool
    how: str

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return self.step is not None and (self.limit is None or self.needed <= self.limit)

    @property
    def tiled(self) -> bool:
        """Whether softmax attention never holds all scores there."""
        return is_tiled(self.target, self.traced.parts.config)


def is_tiled(target: Target, config: Config) -> bool:
    """Whether softmax attention never holds all scores on a target."""
    return target.chip is not None and softmax_is_tiled(config, target.chip.platform)


def usable(chip: Chip) -> int:
    """Bytes of a chip's memory that a step can have; of TPUs the compiler knows what else is in it."""
    return int(chip.memory * GPU_FRACTION) if chip.platform == "gpu" else chip.memory


def attempt(target: Target, config: Config, report: Report) -> Attempt:
    """Compile the step of `config` for a target, unless its state alone is too large.

    Raises:
        ConfigError: the settings do not fit the devices.
    """
    traced = trace(config, targets.devices(target))
    limit = None if target.chip is None else usable(target.chip)
    state = measure_state(traced)
    alone = state.own + state.trained[0]
    if limit is not None and alone > limit:
        return Attempt(target, traced, alone, limit, None, False, "parameters, gradients and optimizer alone")
    report(f"compiling for {target.name} ...")
    if target.chip is not None and not target.compiles:
        return _by_formula(target, config)
    try:
        made = compile_step(traced)
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        return _by_formula(target, config)
    how = f"compiled in {made.seconds:.0f} s"
    if isinstance(made, TooLarge):
        return Attempt(target, traced, made.bytes, made.limit, None, True, how)
    return Attempt(target, traced, made.bytes, limit, made, True, how)


def _by_formula(target: Target, config: Config) -> Attempt:
    """Compile for this CPU, which tells what is exchanged and refuses wrong settings, and estimate the activations."""
    assert target.chip is not None
    traced = trace(config, targets.virtual_devices(target))
    made = compile_step(traced)
    limit, activations = usable(target.chip), estimate_activations(traced, flash=is_tiled(target, config)).bytes
    how = "activations by formula, not compiled for the chip"
    if isinstance(made, TooLarge):
        return Attempt(target, traced, made.bytes, limit, None, False, how)
    return Attempt(target, traced, made.arguments + activations, limit, made, False, how)
