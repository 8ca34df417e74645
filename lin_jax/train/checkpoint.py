"""Checkpoints: model, optimizer, data position and settings, saved while training goes on.

A checkpoint is a directory `workdir/checkpoints/STEP` with four items: `model` (trained parameters and constants),
`training` (step and optimizer), `data` (the iterator's position) and `meta` (settings, the fingerprint of the training
text, and a checksum of every array, since a changed byte inside an array is read back without complaint). Frozen
parameters stay where they came from, in `finetune.checkpoint`; `meta` has their checksums.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from lin_jax.experiment import Config
from lin_jax.settings.base import ConfigError, first_line, require
from lin_jax.settings.checkpoint import CheckpointConfig
from lin_jax.settings.command_line import config_from_dict, config_to_dict
from lin_jax.train.base import require_same_frozen
from lin_jax.train.checksums import checksums, require_checksums
from lin_jax.train.distributed import lost_another, wait_for_all
from lin_jax.train.state import TrainState
from lin_jax.train.workdir import checkpoints_directory, read_meta, reader, saved_steps

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
    "finetune.medusa.tree_nodes",
    "finetune.checkpoint",  # It may be moved; what is frozen must have the same checksums.
    "train.steps",
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
class Restored:
    """What `restore` found: a state to go on from, or None, and the steps that could not be read."""

    state: TrainState | None
    unreadable: tuple[int, ...] = ()


def restore(config: Config, abstract: TrainState, frozen: Any, text: str, iterator: Any, report: Report) -> Restored:
    """The newest checkpoint that can be read, on the devices that `abstract` names; nothing is written.

    Args:
        config: the settings of the run that wants to go on.
        abstract: shapes, types and shardings of the state; the mesh may differ from the one that saved it.
        frozen: the parameters that do not train, which checkpoints do not hold.
        text: the fingerprint of the training text, in which a position means what it meant.
        iterator: the data iterator, which is set to its position.
        report: is told of checkpoints that cannot be read.

    Raises:
        ConfigError: the checkpoint is one of other settings or of other frozen parameters, or there are some but none
            can be read.
    """
    directory = checkpoints_directory(config.workdir)
    unreadable: list[int] = []
    problem = ""
    with reader(directory) as manager:
        for step in saved_steps(manager):
            try:
                meta = read_meta(manager, step)
                _require_same_settings(meta["config"], config)
                _require_same_text(meta, text, config)
                require_same_frozen(frozen, meta, config)
                state = _restore_state(manager, step, meta, abstract, iterator)
                return Restored(dataclasses.replace(state, frozen=frozen), tuple(unreadable))
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

    def __init__(self, config: Config, restored: Restored, frozen: Any, text: str, report: Report):
        self._config, self._text, self._report = config, text, report
        self._frozen_checksums = checksums(frozen)
        self._directory = checkpoints_directory(config.workdir)
        self._set_aside(restored.unreadable)
        self._manager = _writer(self._directory, config.checkpoint)
        self._saved = self._asked = self._manager.latest_step()
        self._running: int | None = None

    def save(self, step: int, state: TrainState, iterator: Any, validation_loss: float | None) -> None:
        """Start to save `state`, unless this step is saved; what fails is reported, not raised."""
        if step == self._asked:
            return
        self.wait()
        self._asked = step
        try:
            self._start(step, state, iterator, validation_loss)
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

    def _start(self, step: int, state: TrainState, iterator: Any, validation_loss: float | None) -> None:
        model, training = _items(state)
        sums = {name: checksums(item) for name, item in (("model", model), ("training", training))}
        sums["frozen"] = self._frozen_checksums
        meta = {"config": config_to_dict(self._config), "checksums": sums, "text": self._text}
        self._running = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model),
                training=ocp.args.StandardSave(training),
                data=ocp.args.JsonSave(iterator.get_state()),
                meta=ocp.args.JsonSave(meta),
            ),
            metrics=_metrics(validation_loss),
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
        for left in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            left.rmtree(missing_ok=True)
        self._manager = _writer(self._directory, self._config.checkpoint)
        self._saved = self._manager.latest_step()

    def _set_aside(self, steps: tuple[int, ...]) -> None:
        """Move checkpoints that cannot be read out of the way, so that their steps can be saved again."""
        for step in steps if jax.process_index() == 0 else ():
            aside = epath.Path(self._config.workdir) / "unreadable_checkpoints"
            aside.mkdir(parents=True, exist_ok=True)
            number = len(list(aside.glob(f"{step}*")))
            (self._directory / str(step)).rename(aside / (f"{step}_{number}" if number else str(step)))
        wait_for_all("unreadable checkpoints")


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    model = {"parameters": state.parameters, "constants": state.constants}
    return model, {"step": state.step, "optimizer": state.optimizer}


def _writer(directory: epath.Path, config: CheckpointConfig) -> Any:
    keep: list[Any] = [policies.LatestN(config.keep)]
    if config.keep_best:
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["validation_loss"],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        keep.append(best)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(directory, options=options)


def _close_quietly(manager: Any) -> None:
    """Close a manager whose error is already known; it raises the same one again."""
    try:
        manager.close()
    except Exception:
        return


def _metrics(validation_loss: float | None) -> dict[str, float] | None:
    finite = validation_loss is not None and math.isfinite(validation_loss)
    return {"validation_loss": float(validation_loss)} if finite else None  # type: ignore[arg-type]


def _require_same_settings(saved: Mapping[str, Any], config: Config) -> None:
    """Raise `ConfigError` naming the first setting that a resumed run must not change."""
    # Settings that are newer than the checkpoint had their defaults then.
    old_values = _flatten(config_to_dict(config_from_dict(dict(saved))))
    for name, value in _flatten(config_to_dict(config)).items():
        old = old_values.get(name)
        free = any(name == setting or name.startswith(setting + ".") for setting in FREE_SETTINGS)
        require(
            free or old == value,
            f"config.{name} is {value}, but the checkpoints in {checkpoints_directory(config.workdir)} were made with "
            f"{old}: set it back, or choose another --config.workdir",
        )


def _require_same_text(meta: Mapping[str, Any], text: str, config: Config) -> None:
    require(
        meta.get("text", text) == text,
        f"the training text has changed since the run in {config.workdir} was started (its documents lie elsewhere), "
        "so it would go on with other text than what follows: put it back, or choose another --config.workdir",
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
