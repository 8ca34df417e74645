"""Checkpoints: model, optimizer, data position and settings, saved while training goes on.

A checkpoint is a directory `workdir/checkpoints/STEP` with four items: `model` (trained parameters and constants),
`training` (step and optimizer), `data` (the iterator's position) and `meta` (settings, a checksum of every array, and
fingerprints of what the position and the parameters mean something for: training text, tokenizer, metrics so far).
Beside them is the manifest of all their files (`lin_jax.train.manifest`). Frozen parameters stay where they came from,
in `finetune.checkpoint`; `meta` has their checksums.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lin_jax.experiment import Config, config_from_dict
from lin_jax.ops.checksums import checksums, require_checksums
from lin_jax.settings.base import ConfigError, first_line, require
from lin_jax.settings.checkpoint import CheckpointConfig
from lin_jax.settings.dictionaries import section_to_dict
from lin_jax.tasks.registry import task_of
from lin_jax.train.base import require_same_frozen
from lin_jax.train.distributed import lost_another, wait_for_all
from lin_jax.train.manifest import UNFINISHED, require_undamaged, saving_options
from lin_jax.train.state import TrainState
from lin_jax.train.workdir import checkpoints_directory, read_meta, reader, saved_steps, tokenizer_directory

Report = Callable[[str], None]

# Settings that a resumed run may change: they do not alter what is learned from what, only how it is computed,
# watched and kept. `train.steps` may grow (the schedule is then that of the new length).
FREE_SETTINGS = (
    "workdir",
    "profile",
    "show_sharding",
    "plan",
    "mesh",
    "distributed",
    "checkpoint",
    "data.tfds_directory",
    "data.cache_directory",
    "model.dtype",
    "model.remat",
    "model.attention.implementation",
    "finetune.checkpoint",  # It may be moved; what is frozen must have the same checksums.
    "train.steps",
    "train.epochs",
    "train.microbatches",
    "train.loss_chunk",
    "train.log_every",
    "train.evaluate_every",
    "train.evaluate_batches",
    "train.max_skipped",
)


def has_checkpoint(config: Config) -> bool:
    """Whether there is a run to go on with.

    Raises:
        ConfigError: there is one, but it was made with other settings.
    """
    with reader(checkpoints_directory(config.workdir)) as manager:
        for step in saved_steps(manager):
            try:
                meta = read_meta(manager, step)
            except Exception:  # `restore` reports the damage.
                continue
            _require_same_settings(meta["config"], config)
            return True
        return bool(saved_steps(manager))


@dataclasses.dataclass(frozen=True)
class Fingerprints:
    """Of what a run reads: the same as long as a position in the data and the parameters mean the same.

    Attributes:
        text: of the training text.
        tokenizer: of the files that the run keeps of its tokenizer.
    """

    text: str
    tokenizer: str


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `restore` found: a state to go on from, or None, and the steps that could not be read.

    `metrics` is the checksum of the metrics up to there, None where the checkpoint has none.
    """

    state: TrainState | None
    unreadable: tuple[int, ...] = ()
    metrics: int | None = None


def restore(
    config: Config, abstract: TrainState, frozen: Any, fingerprints: Fingerprints, iterator: Any, report: Report
) -> Restored:
    """Return the newest checkpoint that can be read, on the devices that `abstract` names; nothing is written.

    Args:
        config: the settings of the run that wants to go on.
        abstract: shapes, types and shardings of the state; the mesh may differ from the one that saved it.
        frozen: the parameters that do not train, which checkpoints do not hold.
        fingerprints: of what the run reads.
        iterator: the data iterator, which is set to its position.
        report: is told of checkpoints that cannot be read.

    Raises:
        ConfigError: the checkpoint is one of other settings, other frozen parameters, another training text or
            tokenizer, or there are some but none can be read.
    """
    directory = checkpoints_directory(config.workdir)
    unreadable: list[int] = []
    problem = ""
    with reader(directory) as manager:
        for step in saved_steps(manager):
            try:
                meta = read_meta(manager, step)
                _require_same_settings(meta["config"], config)
                _require_same_fingerprints(meta, fingerprints, config)
                require_same_frozen(frozen, meta, config)
                state = _restore_state(manager, step, meta, abstract, iterator)
                return Restored(dataclasses.replace(state, frozen=frozen), tuple(unreadable), meta.get("metrics"))
            except ConfigError:
                raise
            except Exception as error:  # Damage shows as nearly any type of error.
                problem = first_line(error)
                unreadable.append(step)
                report(f"checkpoint {step} in {directory} cannot be read ({problem}); trying the one before it")
    require(
        not unreadable,
        f"none of the checkpoints {unreadable} in {directory} can be read ({problem}); choose another --config.workdir",
    )
    return Restored(None)


def _restore_state(manager: Any, step: int, meta: Mapping, abstract: TrainState, iterator: Any) -> TrainState:
    require_undamaged(manager.directory / str(step), ("model", "training", "data"))
    model, training = _items(abstract)
    found = manager.restore(
        step,
        args=ocp.args.Composite(
            model=ocp.args.StandardRestore(model),
            training=ocp.args.StandardRestore(training),
            data=ocp.args.JsonRestore(),
        ),
    )
    require_checksums({"model": found["model"], "training": found["training"]}, meta)
    iterator.set_state(found["data"])
    return TrainState(**found["model"], **found["training"], frozen={})


class Checkpoints:
    """Saves a run's state in the background, and survives a disk that is full."""

    def __init__(self, config: Config, restored: Restored, frozen: Any, fingerprints: Fingerprints, report: Report):
        """Take over a run's checkpoints from what `restore` found; raise `ConfigError` where that is impossible."""
        self._config, self._fingerprints, self._report = config, fingerprints, report
        self._frozen_checksums = checksums(frozen)
        self._directory = checkpoints_directory(config.workdir)
        self._set_aside(restored.unreadable)
        self._running: int | None = None
        self._losses = _validation_losses(self._directory)
        self._manager = self._open()
        self._saved = self._asked = self._manager.latest_step()
        self._finish_removals()

    def save(self, step: int, state: TrainState, iterator: Any, validation_loss: float | None, metrics: int) -> None:
        """Start to save `state`, unless this step is saved; what fails is reported, not raised.

        Args:
            step: the number of updates.
            state: what they led to.
            iterator: the data iterator.
            validation_loss: that of an evaluation at this step.
            metrics: the checksum of the metrics up to this step.
        """
        if step == self._asked:
            return
        self.wait()
        self._asked = step
        try:
            self._start(step, state, iterator, validation_loss, metrics)
        except Exception as error:
            self._give_up(step, error)

    def poll(self) -> None:
        """Report a save that failed in the background."""
        self._settle(self._manager.check_for_errors)

    def wait(self) -> None:
        """Block until nothing is being saved any more."""
        self._settle(self._manager.wait_until_finished)

    def close(self) -> None:
        """Finish saving and stop the background threads."""
        self.wait()
        self._manager.close()

    @property
    def complete(self) -> bool:
        """Whether the last `save` is known to have worked; call `wait` first."""
        return self._saved == self._asked

    def _start(self, step: int, state: TrainState, iterator: Any, validation_loss: float | None, metrics: int) -> None:
        model, training = _items(state)
        sums = {name: checksums(item) for name, item in (("model", model), ("training", training))}
        sums["frozen"] = self._frozen_checksums
        loss = validation_loss if validation_loss is not None and math.isfinite(validation_loss) else None
        meta = {
            "config": section_to_dict(self._config),
            "checksums": sums,
            "metrics": metrics,
            "validation_loss": loss,
            **dataclasses.asdict(self._fingerprints),
        }
        self._running, self._losses[step] = step, loss
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model),
                training=ocp.args.StandardSave(training),
                data=ocp.args.JsonSave(iterator.get_state()),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def _settle(self, action: Callable[[], Any]) -> None:
        if self._running is None:
            return
        try:
            action()
        except Exception as error:
            self._give_up(self._running, error)
            return
        if not self._manager.is_saving_in_progress():
            self._saved, self._running = self._running, None

    def _give_up(self, step: int, error: Exception) -> None:
        """Drop a failed save with what it left on the disk; the manager would count it as done.

        One process of several cannot go on alone, since the others may not know. Nor can it save without them: then
        it is not the disk that is to blame.
        """
        if jax.process_count() > 1 and lost_another(error):
            raise error
        message = f"checkpoint {step} could not be saved ({first_line(error)})"
        require(jax.process_count() == 1, f"{message}: see to {self._directory}, then run again")
        self._report(
            f"warning: {message}; training goes on, the newest checkpoint in {self._directory} is {self._saved}"
        )
        self._running = None
        _close_quietly(self._manager)
        for left in self._directory.glob(f"{step}{UNFINISHED}*"):
            left.rmtree(missing_ok=True)
        self._manager = self._open()
        self._saved = self._manager.latest_step()

    def _open(self) -> Any:
        """Return the library's writer of this run's checkpoints."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Keep(self._config.checkpoint, self._losses),
            cleanup_tmp_directories=True,
            async_options=saving_options(self._directory, lambda: self._running or 0),
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def _finish_removals(self) -> None:
        """Remove the checkpoints that a start that was killed had not removed yet, or only half."""
        steps = sorted(self._manager.all_steps())
        for step in set(steps) - kept_steps(steps, self._losses, self._config.checkpoint):
            self._manager.delete(step)

    def _set_aside(self, steps: tuple[int, ...]) -> None:
        """Move checkpoints that cannot be read out of the way, so that their steps can be saved again."""
        aside = epath.Path(self._config.workdir) / "unreadable_checkpoints"
        try:
            for step in steps if jax.process_index() == 0 else ():
                aside.mkdir(parents=True, exist_ok=True)
                number = len(list(aside.glob(f"{step}*")))
                (self._directory / str(step)).rename(aside / (f"{step}_{number}" if number else str(step)))
        except OSError as error:
            raise ConfigError(
                f"checkpoint {steps[0]} cannot be moved to {aside} ({first_line(error)}): see to that, then run again"
            ) from error
        wait_for_all("unreadable checkpoints")


def kept_steps(steps: Sequence[int], losses: Mapping[int, float | None], config: CheckpointConfig) -> set[int]:
    """Return which checkpoints stay: the last ones, and the one with the lowest validation loss.

    Args:
        steps: of all checkpoints, rising.
        losses: the validation loss of a step, where there was an evaluation.
        config: how many stay, and whether the best does.
    """
    evaluated = {step: loss for step in steps if (loss := losses.get(step)) is not None}
    best = [min(evaluated, key=lambda step: (evaluated[step], -step))] if config.keep_best and evaluated else []
    return {*steps[-config.keep :], *best}


class _Keep:
    """`kept_steps` as the library asks for it."""

    def __init__(self, config: CheckpointConfig, losses: Mapping[int, float | None]):
        self._config, self._losses = config, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = kept_steps(steps, self._losses, self._config)
        return [step in kept for step in steps]


def _validation_losses(directory: epath.Path) -> dict[int, float | None]:
    """Return the validation losses of the checkpoints in a directory; one that cannot be read has none."""
    losses: dict[int, float | None] = {}
    with reader(directory) as manager:
        for step in saved_steps(manager):
            try:
                losses[step] = read_meta(manager, step).get("validation_loss")
            except Exception:  # Half removed, or damaged: then nobody can use it, however good it was.
                losses[step] = None
    return losses


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    model = {"parameters": state.parameters, "constants": state.constants}
    return model, {"step": state.step, "optimizer": state.optimizer}


def _close_quietly(manager: Any) -> None:
    """Close a manager whose error is already known; it raises the same one again."""
    try:
        manager.close()
    except Exception:
        return


def _require_same_settings(saved: Mapping[str, Any], config: Config) -> None:
    """Raise `ConfigError` naming the first setting that a resumed run must not change."""
    # Settings that are newer than the checkpoint had their defaults then.
    old_values = _flatten(section_to_dict(config_from_dict(dict(saved))))
    free_settings = (*FREE_SETTINGS, *task_of(config).free_settings)
    for name, value in _flatten(section_to_dict(config)).items():
        old = old_values.get(name)
        free = any(name == setting or name.startswith(setting + ".") for setting in free_settings)
        require(
            free or old == value,
            f"config.{name} is {value}, but the checkpoints in {checkpoints_directory(config.workdir)} were made with "
            f"{old}: set it back, or choose another --config.workdir",
        )


def _require_same_fingerprints(meta: Mapping[str, Any], now: Fingerprints, config: Config) -> None:
    """Raise `ConfigError` where the run would go on with another text or tokenizer than it had."""
    again = "put it back, or choose another --config.workdir"
    require(
        meta.get("text", now.text) == now.text,
        f"the training text has changed since the run in {config.workdir} was started (its documents lie elsewhere), "
        f"so it would go on with other text than what follows: {again}",
    )
    require(
        meta.get("tokenizer", now.tokenizer) == now.tokenizer,
        f"the tokenizer in {tokenizer_directory(config.workdir)} is not the one that the checkpoints were made with: "
        f"{again} (a run with the same settings has the same files)",
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
