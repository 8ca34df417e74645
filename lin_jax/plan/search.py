"""What would make a step fit that does not: tried, not guessed."""

import dataclasses
import itertools
from collections.abc import Iterator

from lin_jax.experiment import Config
from lin_jax.plan import target as targets
from lin_jax.plan.compiled import trace
from lin_jax.plan.estimate import estimate_activations, measure_state
from lin_jax.plan.fit import Report, attempt, is_tiled
from lin_jax.plan.report import gib
from lin_jax.plan.suggest import Suggestion, larger_topologies, smaller
from lin_jax.plan.target import Target
from lin_jax.settings.base import ConfigError

# Compilations that a plan which does not fit may take to find settings that do, and as many to find more chips.
TRIES = 3
# Formulas say too much rather than too little; what they say is too large by less is tried.
_TOLERANCE = 1.3


def advice(target: Target, config: Config, report: Report) -> str:
    """Half a line: settings with which `config` fits, or the fewest chips on which it does."""
    for suggestion in itertools.islice(_promising(target, smaller(config, target.count), _TOLERANCE), TRIES):
        found = _try(target, suggestion, report)
        if found:
            return found
    return _more_chips(target, config, report) or "nothing that was tried makes it fit"


def _more_chips(target: Target, config: Config, report: Report) -> str | None:
    assert target.chip is not None
    larger = (targets.parse(name) for name in larger_topologies(target.chip, target.count))
    firsts = ((devices, next(_promising(devices, _on(devices, config), 1.0), None)) for devices in larger)
    promising = ((devices, suggestion) for devices, suggestion in firsts if suggestion is not None)
    for devices, suggestion in itertools.islice(promising, TRIES):
        found = _try(devices, suggestion, report)
        if found:
            return f"no setting helps there, but {found}"
    return None


def _on(target: Target, config: Config) -> Iterator[Suggestion]:
    """`config` on other devices, its state cut over all of them, and with settings that take less memory."""
    wider = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=-1), plan=target.name)
    told = (f"--config.plan={target.name}", "--config.mesh.data=1", "--config.mesh.fsdp=-1")
    yield Suggestion(told, wider)
    for suggestion in smaller(wider, target.count):
        yield Suggestion((*told, *suggestion.settings), suggestion.config)


def _promising(target: Target, suggestions: Iterator[Suggestion], tolerance: float) -> Iterator[Suggestion]:
    """Those that suit the devices and that formulas give a chance."""
    assert target.chip is not None
    for suggestion in suggestions:
        try:
            traced = trace(suggestion.config, targets.devices(target))
        except ConfigError:
            continue
        activations = estimate_activations(traced, flash=is_tiled(target, suggestion.config))
        if measure_state(traced).own + activations.bytes <= tolerance * target.chip.memory:
            yield suggestion


def _try(target: Target, suggestion: Suggestion, report: Report) -> str | None:
    told = " ".join(suggestion.settings)
    report(f"trying {told}")
    found = attempt(target, suggestion.config, report)
    if not found.fits:
        report(f"does not fit: {gib(found.needed)} ({found.how})")
        return None
    return f"it does with {told}: {gib(found.needed)} ({found.how})"
