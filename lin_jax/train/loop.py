"""Training from a configuration to a trained model in a directory; run again, it goes on where it stopped."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lin_jax.data.tokenizers import Tokenizer
from lin_jax.experiment import Config
from lin_jax.models.structure import Structure
from lin_jax.paths import LocalFiles
from lin_jax.settings.base import first_line, require
from lin_jax.tasks.base import ResultFile
from lin_jax.train import checkpoint, sharding, workdir
from lin_jax.train.distributed import any_process, only_first, settled
from lin_jax.train.metrics import METRICS, MetricsLog, draw_learning_curve
from lin_jax.train.parts import Parts, abstract_batch, make_parts, make_step
from lin_jax.train.record import RECORD
from lin_jax.train.start import Ready, completed, new_state, open_workdir, prepare
from lin_jax.train.state import TrainState, abstract_state
from lin_jax.train.stop import StopRequest
from lin_jax.train.trainable import step_flops, structure_of
from lin_jax.train.validation import Evaluator

Report = Callable[[str], None]

# A trace of these steps after a start: compilation is over, and the file stays small.
_PROFILED_STEPS = (3, 6)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: the last one.
        interrupted: whether it can go on.
        validation: the last measures by name; None if it was interrupted.
        described: a line about them.
    """

    step: int
    interrupted: bool
    validation: Mapping[str, float] | None
    described: str


def train(config: Config, report: Report = print, stop: StopRequest | None = None) -> Result:
    """Train, from the newest checkpoint in `config.workdir` if there is one.

    SIGTERM and Ctrl-C save a checkpoint and end the run, which goes on when it is started again.

    Args:
        config: all settings.
        report: is called with each line for the user.
        stop: says when to stop; while it trains, SIGTERM and Ctrl-C do by default.

    Raises:
        ConfigError: a setting or an input is wrong (nothing has been written then), or training diverged.
    """
    config, report = completed(config), only_first(report)
    partition = sharding.make_partition(config.mesh)
    with contextlib.closing(workdir.RunLock(config.workdir)) as lock:
        lock.take()
        ready = prepare(config, partition)
        parts = make_parts(config, partition)
        with contextlib.closing(parts.task.training_batches(ready.tokenizer, parts.feed.own)) as iterator:
            return _train(parts, ready, iterator, lock, report, stop or StopRequest())


def show_sharding(config: Config) -> str:
    """The mesh, and a table of the model's parameters: shape, how they are cut, bytes on each device."""
    partition = sharding.make_partition(config.mesh)
    structure = structure_of(config)
    shapes, _ = jax.eval_shape(structure.initialise, jnp.uint32(0))
    return sharding.show_sharding(partition, shapes, structure.parameter_shardings(partition))


def _train(
    parts: Parts, ready: Ready, iterator: Any, lock: workdir.RunLock, report: Report, stop: StopRequest
) -> Result:
    config, tokenizer = parts.config, ready.tokenizer
    abstract = abstract_state(parts.structure, parts.optimizer, parts.shardings)
    told = report if not ready.resumes else lambda line: None
    start = new_state(parts, told) if parts.structure.has_frozen or not ready.resumes else None
    frozen = start.frozen if start is not None else {}
    kept = workdir.tokenizer_fingerprint(config.workdir)
    fingerprints = checkpoint.Fingerprints(ready.text, kept)
    restored = checkpoint.restore(config, abstract, frozen, fingerprints, iterator, report)
    state: Any = restored.state if restored.state is not None else start
    del start
    step = int(state.step)
    require(
        step <= config.train.steps,
        f"the newest checkpoint in {config.workdir} is of step {step}, beyond train.steps={config.train.steps}: raise "
        "that, or choose another --config.workdir",
    )
    files = LocalFiles(config.workdir, (METRICS, RECORD) if jax.process_index() == 0 else ())
    open_workdir(parts, None if ready.resumes else tokenizer, files, step, lock)
    fingerprints = checkpoint.Fingerprints(ready.text, workdir.tokenizer_fingerprint(config.workdir))
    log = MetricsLog(
        files.directory,
        step,
        config.train.steps,
        float(step_flops(config).needed),
        parts.task.best_by,
        report,
        restored.metrics,
        parts.task.unit,
    )
    saver = checkpoint.Checkpoints(config, restored, frozen, fingerprints, log.message)
    try:
        return _Run(parts, tokenizer, files, log, saver, stop).run(state, step, iterator)
    finally:
        saver.close()
        log.close()


def _count_parameters(structure: Structure) -> str:
    shapes, _ = jax.eval_shape(structure.initialise, jnp.uint32(0))
    total, trained = (
        sum(math.prod(shape.shape) for shape in jax.tree.leaves(tree)) for tree in (shapes, structure.split(shapes)[0])
    )
    return f"{total:,} parameters" + (f", {trained:,} of them trained," if trained < total else "")


class _Run:
    """The loop, with what it writes to."""

    def __init__(
        self,
        parts: Parts,
        tokenizer: Tokenizer,
        files: LocalFiles,
        log: MetricsLog,
        saver: checkpoint.Checkpoints,
        stop: StopRequest,
    ):
        self._parts, self._log, self._saver, self._stop = parts, log, saver, stop
        self._train, self._files = parts.config.train, files
        self._evaluator = Evaluator(parts, tokenizer)
        self._step, self._compiled = make_step(parts), dict[tuple[Any, ...], Any]()
        self._tracing = False

    def run(self, state: TrainState, start: int, iterator: Iterator) -> Result:
        """Train from step `start` to the end, or until asked to stop."""
        steps = self._train.steps
        if start:
            self._log.message(f"resumed from the checkpoint of step {start}")
        elif self._parts.config.finetune.checkpoint and self._train.evaluate_every:
            self._validate(0, state)  # What the model can do before it is changed further.
        if start < steps:
            self._compile(state, abstract_batch(self._parts))
        self._log.restart_clock()
        with self._stop.saving():
            return self._steps(state, start, iterator)

    def _steps(self, state: TrainState, start: int, iterator: Iterator) -> Result:
        steps = self._train.steps
        for step in range(start + 1, steps + 1):
            self._profile(step - start)
            batch = self._parts.feed(next(iterator))
            if _shapes(batch) not in self._compiled:
                self._compile(state, batch)
            state, metrics = settled(self._compiled[_shapes(batch)](state, batch))
            self._log.add(step, metrics)
            if self._is_told_to_stop(step):
                self._save(step, state, iterator)
                return self._finish(step, interrupted=True)
            self._after(step, state, iterator)
        self._stop_profile()
        validation = self._validate(steps, state)
        self._save(steps, state, iterator)
        return self._finish(steps, interrupted=False, validation=validation, state=state)

    def _after(self, step: int, state: TrainState, iterator: Iterator) -> None:
        """What is due after a step: metrics, an evaluation, a checkpoint."""
        if self._due(step, self._train.log_every):
            self._flush()
            self._saver.poll()
        if step < self._train.steps and self._due(step, self._train.evaluate_every):
            self._validate(step, state)
        if step < self._train.steps and self._due(step, self._parts.config.checkpoint.every):
            self._save(step, state, iterator)

    def _is_told_to_stop(self, step: int) -> bool:
        """Whether to stop now. Several processes stop together, at a step that `log_every` divides."""
        if jax.process_count() == 1:
            return self._stop.requested
        return self._due(step, self._train.log_every) and any_process(self._stop.requested)

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _flush(self) -> None:
        in_a_row = self._log.flush()
        require(
            in_a_row < self._train.max_skipped,
            f"the gradient was not finite for {in_a_row} steps in a row: lower optimizer.peak_learning_rate, or look "
            "at the data",
        )

    def _save(self, step: int, state: TrainState, iterator: Iterator) -> None:
        self._flush()
        self._publish()  # Before the checkpoint, whose lines of metrics must be there.
        validation = self._log.validation_at(step)
        cost = self._parts.task.cost(validation) if validation else None
        self._saver.save(step, state, iterator, cost, self._log.checksum)
        self._log.restart_clock()

    def _publish(self) -> None:
        if jax.process_index() != 0:
            return
        try:
            self._files.publish()
        except Exception as error:  # of whatever library speaks to a remote directory
            self._log.message(f"warning: metrics cannot be copied to {self._parts.config.workdir}: {first_line(error)}")

    def _validate(self, step: int, state: TrainState) -> Mapping[str, float]:
        self._flush()
        found = self._log.validation_at(step)
        if found is None:
            values = self._evaluator.measure(state)
            self._log.write_validation(step, values)
            self._log.message(f"step {step}: {self._parts.task.describe(values)}")
            found = values
        self._log.restart_clock()
        return found

    def _compile(self, state: TrainState, batch: Mapping[str, Any]) -> None:
        """Compile the step for batches of this shape, the largest first, which tells its memory."""
        first = not self._compiled
        if not first:
            self._flush()  # Compilation is no part of the speed.
        begin = time.perf_counter()
        compiled = self._step.lower(state, batch).compile()
        seconds = time.perf_counter() - begin
        self._compiled[_shapes(batch)] = compiled
        if first:
            devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
            parameters = _count_parameters(self._parts.structure)
            told = f"{parameters} on {devices}; compiled in {seconds:.0f} s{_memory(compiled)}"
        else:
            told = f"compiled for batches of {_told(batch)} in {seconds:.0f} s"
        self._log.message(told)
        self._log.restart_clock()

    def _profile(self, step: int) -> None:
        """Start or stop the trace; `step` counts from the start of this process."""
        if self._parts.config.profile and step == _PROFILED_STEPS[0]:
            jax.profiler.start_trace(str(self._files.directory / "profile"))
            self._tracing = True
        elif step == _PROFILED_STEPS[1]:
            self._stop_profile()

    def _stop_profile(self) -> None:
        if self._tracing:
            self._flush()
            jax.profiler.stop_trace()
            self._tracing = False

    def _finish(
        self,
        step: int,
        *,
        interrupted: bool,
        validation: Mapping[str, float] | None = None,
        state: TrainState | None = None,
    ) -> Result:
        task, described = self._parts.task, ""
        results: Sequence[ResultFile] = ()
        if validation is not None and state is not None:
            described, results = task.describe(validation), task.results(validation, self._evaluator.at(state))
        self._saver.wait()
        self._log.close()
        if jax.process_index() == 0:
            self._write(results)
        self._publish()
        require(self._saver.complete, f"the checkpoint of step {step} could not be saved; free space and run again")
        return Result(step, interrupted, validation, described)

    def _write(self, results: Sequence[ResultFile]) -> None:
        """Write what a run leaves behind at its end."""
        directory = self._files.directory
        try:
            draw_learning_curve(directory)
            for result in results:
                (directory / result.name).write_text(result.text, encoding="utf-8")
                self._log.message(f"{directory / result.name}: {result.told}")
        except OSError as error:
            self._log.message(f"warning: {directory} cannot be written to ({first_line(error)})")


def _shapes(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a step is compiled for."""
    return tuple((name, batch[name].shape) for name in sorted(batch))


def _told(batch: Mapping[str, Any]) -> str:
    """Return the shapes of a batch for people."""
    shapes = dict.fromkeys(array.shape for array in batch.values() if array.ndim > 1)
    return ", ".join(" x ".join(map(str, shape)) for shape in shapes)


def _memory(compiled: Any) -> str:
    """What a compiled step needs on each device, where the backend tells."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return ""
    used = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    return f", {used / 2**20:,.0f} MiB a device"
