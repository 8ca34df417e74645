"""Training from a configuration to a trained model in a directory; run again, it goes on where it stopped."""

import contextlib
import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lin_jax.config import Config, ConfigError, require
from lin_jax.data.checks import check_data, check_vocabulary
from lin_jax.data.pipeline import training_batches, validation_batches, validation_bytes_per_token
from lin_jax.data.tokenizers import Tokenizer, load_tokenizer, restore_tokenizer
from lin_jax.models.flops import training_flops_per_token
from lin_jax.models.registry import create_model
from lin_jax.train import checkpoint, sharding
from lin_jax.train.metrics import MetricsLog, draw_learning_curve
from lin_jax.train.optimizer import learning_rate_schedule, make_optimizer
from lin_jax.train.record import write_run_record
from lin_jax.train.state import Structure, TrainState, abstract_state, initial_state, make_structure, state_shardings
from lin_jax.train.step import LossSettings, make_evaluation_step, make_train_step
from lin_jax.train.stop import StopRequest

Report = Callable[[str], None]

_BATCH_TYPES = {"tokens": np.int32, "targets": np.int32, "segment_ids": np.int32, "weights": np.float32}
# A trace of these steps after a start: compilation is over, and the file stays small.
_PROFILED_STEPS = (3, 6)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    `validation` holds validation_loss (nats per token), perplexity and bits_per_byte; None if it was interrupted.
    """

    step: int
    interrupted: bool
    validation: Mapping[str, float] | None


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of, before anything is written."""

    config: Config
    mesh: Mesh
    structure: Structure
    optimizer: optax.GradientTransformation
    shardings: TrainState
    tokenizer: Tokenizer


def train(config: Config, report: Report = print) -> Result:
    """Train, from the newest checkpoint in `config.workdir` if there is one.

    SIGTERM and Ctrl-C save a checkpoint and end the run, which goes on when it is started again.

    Args:
        config: all settings.
        report: is called with each line for the user.

    Raises:
        ConfigError: a setting or an input is wrong (nothing has been written then), or training diverged.
    """
    parts = _prepare(config)
    with contextlib.closing(training_batches(config.data, parts.tokenizer, **_process())) as iterator:
        return _train(parts, iterator, report)


def show_sharding(config: Config) -> str:
    """A table of the model's parameters: shape, how they are cut, bytes on each device."""
    mesh = sharding.make_mesh(config.mesh)
    structure = make_structure(lambda rngs: create_model(config.model, rngs))
    shapes, _ = jax.eval_shape(structure.initialise, jnp.uint32(0))
    return sharding.show_sharding(shapes, structure.parameter_shardings(mesh))


def _process() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def _train(parts: Parts, iterator: Any, report: Report) -> Result:
    config = parts.config
    abstract = abstract_state(parts.structure, parts.optimizer, parts.shardings)
    restored = checkpoint.restore(config, abstract, iterator, report)
    state = restored.state if restored.state is not None else _new_state(parts)
    step = int(state.step)
    require(
        step <= config.train.steps,
        f"the newest checkpoint in {config.workdir} is of step {step}, beyond train.steps={config.train.steps}: raise "
        "that, or choose another --config.workdir",
    )
    _open_workdir(parts, step)
    log = MetricsLog(
        config.workdir,
        step,
        config.train.steps,
        training_flops_per_token(config.model, config.data.sequence_length),
        report,
    )
    saver = checkpoint.Checkpoints(config, restored, log.message)
    try:
        with StopRequest() as stop:
            return _Run(parts, log, saver, stop).go_on(state, step, iterator)
    finally:
        saver.close()
        log.close()


def _prepare(config: Config) -> Parts:
    """Check everything that can be checked without computing, in the order of what it costs."""
    require("://" not in config.workdir, f"config.workdir must be a local or mounted directory: {config.workdir}")
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config.data.batch_size, config.train.microbatches)
    tokenizer = _tokenizer(config)
    check_data(config.data, config.model.vocabulary_size, tokenizer)
    structure = make_structure(lambda rngs: create_model(config.model, rngs))
    optimizer = make_optimizer(config.optimizer, config.train.steps, structure.metadata("decay"))
    return Parts(config, mesh, structure, optimizer, state_shardings(structure, optimizer, mesh), tokenizer)


def _tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of the run that goes on; of a new one, what the settings say."""
    if checkpoint.has_checkpoint(config):
        return restore_tokenizer(checkpoint.tokenizer_directory(config.workdir))
    check_vocabulary(config.data, config.model.vocabulary_size)
    with tempfile.TemporaryDirectory() as directory:  # A learned one is written here first: nothing is sure yet.
        return load_tokenizer(config.data, directory)


def _new_state(parts: Parts) -> TrainState:
    """The state before the first step, made in place on the devices."""
    initialise = jax.jit(
        lambda seed: initial_state(parts.structure, parts.optimizer, seed), out_shardings=parts.shardings
    )
    return initialise(jnp.uint32(parts.config.train.seed))


def _open_workdir(parts: Parts, step: int) -> None:
    if jax.process_index() != 0:
        return
    shapes, _ = jax.eval_shape(parts.structure.initialise, jnp.uint32(0))
    try:
        Path(parts.config.workdir).mkdir(parents=True, exist_ok=True)
        parts.tokenizer.save(checkpoint.tokenizer_directory(parts.config.workdir))
        write_run_record(parts.config, step, sum(math.prod(shape.shape) for shape in jax.tree.leaves(shapes)))
    except OSError as error:
        raise ConfigError(f"cannot write to config.workdir={parts.config.workdir}: {error.strerror}") from error


class _Run:
    """The loop, with what it writes to."""

    def __init__(self, parts: Parts, log: MetricsLog, saver: checkpoint.Checkpoints, stop: StopRequest):
        config = parts.config
        self._parts, self._log, self._saver, self._stop = parts, log, saver, stop
        self._train, self._workdir = config.train, config.workdir
        self._settings = LossSettings(
            config.train.loss_chunk, config.optimizer.z_loss, use_segments=config.data.packing == "segments"
        )
        self._batch_sharding = sharding.batch_sharding(parts.mesh)
        self._evaluate_batch: Any = None
        self._bytes_per_token: float | None = None
        self._tracing = False

    def go_on(self, state: TrainState, start: int, iterator: Iterator) -> Result:
        """Train from step `start` to the end, or until asked to stop."""
        steps = self._train.steps
        if start:
            self._log.message(f"resumed from the checkpoint of step {start}")
        update: Any = self._compile(state) if start < steps else None
        self._log.restart_clock()
        for step in range(start + 1, steps + 1):
            self._profile(step - start)
            state, metrics = update(state, self._to_devices(next(iterator)))
            self._log.add(step, metrics)
            if self._stop.requested(agree=self._due(step, self._train.log_every)):
                self._save(step, state, iterator)
                return self._finish(step, interrupted=True)
            self._after(step, state, iterator)
        self._stop_profile()
        validation = self._validate(steps, state)
        self._save(steps, state, iterator)
        return self._finish(steps, interrupted=False, validation=validation)

    def _after(self, step: int, state: TrainState, iterator: Iterator) -> None:
        """What is due after a step: metrics, an evaluation, a checkpoint."""
        if self._due(step, self._train.log_every):
            self._flush()
            self._saver.poll()
        if step < self._train.steps and self._due(step, self._train.evaluate_every):
            self._validate(step, state)
        if step < self._train.steps and self._due(step, self._parts.config.checkpoint.every):
            self._save(step, state, iterator)

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
        validation = self._log.validation_at(step)
        self._saver.save(step, state, iterator, validation["validation_loss"] if validation else None)
        self._log.restart_clock()

    def _validate(self, step: int, state: TrainState) -> Mapping[str, float]:
        self._flush()
        found = self._log.validation_at(step)
        if found is None:
            values = self._evaluate(state)
            self._log.write_validation(step, values)
            self._log.message(f"step {step}: {describe(values)}")
            found = values
        self._log.restart_clock()
        return {name: value for name, value in found.items() if name != "step"}

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        config, tokenizer = self._parts.config, self._parts.tokenizer
        if self._evaluate_batch is None:
            self._evaluate_batch = make_evaluation_step(
                self._parts.structure, self._settings, self._parts.shardings, self._parts.mesh
            )
            self._bytes_per_token = validation_bytes_per_token(config.data, tokenizer)
        sums = []
        with contextlib.closing(validation_batches(config.data, tokenizer, **_process())) as batches:
            for batch in itertools.islice(batches, self._train.evaluate_batches or None):
                sums.append(self._evaluate_batch(state.parameters, state.constants, self._to_devices(batch)))
        fetched = jax.device_get(sums)
        nll, weight = (np.sum([getattr(s, name) for s in fetched], dtype=np.float64) for name in ("nll", "weight"))
        assert self._bytes_per_token is not None
        return validation_values(float(nll), float(weight), float(weight) * self._bytes_per_token)

    def _to_devices(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return sharding.global_batch({name: batch[name] for name in _BATCH_TYPES}, self._batch_sharding)

    def _compile(self, state: TrainState) -> Any:
        """The training step, compiled ahead, which tells its memory."""
        config, parts = self._parts.config, self._parts
        schedule = learning_rate_schedule(config.optimizer, config.train.steps)
        step = make_train_step(
            parts.structure,
            parts.optimizer,
            schedule,
            self._settings,
            config.train.microbatches,
            parts.shardings,
            parts.mesh,
        )
        shape = (config.data.batch_size, config.data.sequence_length)
        batch = {
            name: jax.ShapeDtypeStruct(shape, kind, sharding=self._batch_sharding)
            for name, kind in _BATCH_TYPES.items()
        }
        begin = time.perf_counter()
        compiled = step.lower(state, batch).compile()
        count = sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
        self._log.message(
            f"{count:,} parameters on {jax.device_count()} x {jax.devices()[0].device_kind}; compiled in "
            f"{time.perf_counter() - begin:.0f} s{_memory(compiled)}"
        )
        return compiled

    def _profile(self, step: int) -> None:
        """Start or stop the trace; `step` counts from the start of this process."""
        if self._parts.config.profile and step == _PROFILED_STEPS[0]:
            jax.profiler.start_trace(str(Path(self._workdir) / "profile"))
            self._tracing = True
        elif step == _PROFILED_STEPS[1]:
            self._stop_profile()

    def _stop_profile(self) -> None:
        if self._tracing:
            self._flush()
            jax.profiler.stop_trace()
            self._tracing = False

    def _finish(self, step: int, *, interrupted: bool, validation: Mapping[str, float] | None = None) -> Result:
        self._saver.wait()
        self._log.close()
        if jax.process_index() == 0:
            try:
                draw_learning_curve(self._workdir)
            except OSError as error:
                self._log.message(f"warning: the learning curve cannot be drawn ({error.strerror or error})")
        require(self._saver.complete, f"the checkpoint of step {step} could not be saved; free space and run again")
        return Result(step, interrupted, validation)


def validation_values(nll: float, tokens: float, byte_count: float) -> dict[str, float]:
    """Measures of a text from its summed negative log-likelihood in nats, its tokens and its bytes."""
    loss = nll / tokens if tokens else math.nan
    return {
        "validation_loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nll / math.log(2) / byte_count if byte_count else math.nan,
    }


def describe(values: Mapping[str, float]) -> str:
    """One line for `validation_values`."""
    return (
        f"validation loss {values['validation_loss']:.4f}, perplexity {values['perplexity']:.3f}, "
        f"bits-per-byte {values['bits_per_byte']:.4f}"
    )


def _memory(compiled: Any) -> str:
    """What a compiled step needs on each device, where the backend tells."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return ""
    used = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    return f", {used / 2**20:,.0f} MiB a device"
