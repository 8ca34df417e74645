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
from etils import epath
from jax.sharding import Mesh

from lin_jax.data.checks import check_data, check_vocabulary
from lin_jax.data.pipeline import training_batches, validation_batches, validation_bytes_per_token
from lin_jax.data.tokenizers import Tokenizer, load_tokenizer, restore_tokenizer
from lin_jax.experiment import Config
from lin_jax.layers.partition import Partition
from lin_jax.models.structure import Structure
from lin_jax.paths import LocalFiles, absolute, check_remote
from lin_jax.settings.base import ConfigError, first_line, require
from lin_jax.tasks.medusa import describe_heads, head_values, medusa_evaluation, medusa_loss, write_best_tree
from lin_jax.tasks.transfer import transfer_loss
from lin_jax.train import checkpoint, sharding, workdir
from lin_jax.train.base import check_base
from lin_jax.train.distributed import agree_on, any_process, only_first, require_shared, settled
from lin_jax.train.feed import Feed
from lin_jax.train.metrics import METRICS, MetricsLog, draw_learning_curve
from lin_jax.train.optimizer import learning_rate_schedule, make_optimizer
from lin_jax.train.record import RECORD, write_run_record
from lin_jax.train.saved_model import load_base
from lin_jax.train.state import TrainState, abstract_state, initial_state, state_shardings
from lin_jax.train.step import LossSettings, language_model_loss, make_evaluation_step, make_train_step
from lin_jax.train.stop import StopRequest
from lin_jax.train.trainable import step_flops, structure_of

Report = Callable[[str], None]

_BATCH_TYPES = {"tokens": np.int32, "targets": np.int32, "segment_ids": np.int32, "weights": np.float32}
# What is learned, by `finetune.objective`.
_LOSSES = {"language_model": language_model_loss, "attention_transfer": transfer_loss, "medusa": medusa_loss}
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
    """What is computed in a run, without its numbers."""

    config: Config
    partition: Partition
    structure: Structure
    optimizer: optax.GradientTransformation
    shardings: TrainState

    @property
    def feed(self) -> Feed:
        """What this process reads of a batch."""
        return Feed(sharding.batch_sharding(self.partition), self.config.data.batch_size)

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        assert self.partition.mesh is not None
        return self.partition.mesh

    @property
    def loss_settings(self) -> LossSettings:
        """How a batch becomes a loss."""
        config, finetune = self.config, self.config.finetune
        return LossSettings(
            config.train.loss_chunk,
            config.optimizer.z_loss,
            use_segments=config.data.packing == "segments",
            heads_weight=finetune.medusa.weight if finetune.trains_model else None,
        )


@dataclasses.dataclass(frozen=True)
class _Ready:
    """What was found before anything is computed: `text` is the fingerprint of the training text."""

    resumes: bool
    tokenizer: Tokenizer
    text: str


def make_parts(config: Config, partition: Partition) -> Parts:
    """The parts of a run on the devices of `partition`."""
    structure = structure_of(config)
    decay, _ = structure.split(structure.metadata("decay"))
    optimizer = make_optimizer(config.optimizer, config.train.steps, decay)
    return Parts(config, partition, structure, optimizer, state_shardings(structure, optimizer, partition))


def make_step(parts: Parts) -> Any:
    """The jitted update of a run."""
    config = parts.config
    return make_train_step(
        _LOSSES[config.finetune.objective](parts.structure, parts.loss_settings, parts.partition),
        parts.optimizer,
        learning_rate_schedule(config.optimizer, config.train.steps),
        config.train.microbatches,
        parts.shardings,
        parts.partition,
    )


def abstract_batch(parts: Parts) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of what `make_step` reads."""
    data, cut = parts.config.data, sharding.batch_sharding(parts.partition)
    shape = (data.batch_size, data.sequence_length)
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=cut) for name, kind in _BATCH_TYPES.items()}


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
    config, report = _with_absolute_base(config), only_first(report)
    partition = sharding.make_partition(config.mesh)
    with contextlib.closing(workdir.RunLock(config.workdir)) as lock:
        lock.take()
        ready = _prepare(config, partition)
        parts = make_parts(config, partition)
        with contextlib.closing(training_batches(config.data, ready.tokenizer, parts.feed.own)) as iterator:
            return _train(parts, ready, iterator, lock, report, stop or StopRequest())


def show_sharding(config: Config) -> str:
    """The mesh, and a table of the model's parameters: shape, how they are cut, bytes on each device."""
    partition = sharding.make_partition(config.mesh)
    structure = structure_of(config)
    shapes, _ = jax.eval_shape(structure.initialise, jnp.uint32(0))
    return sharding.show_sharding(partition, shapes, structure.parameter_shardings(partition))


def _with_absolute_base(config: Config) -> Config:
    """The settings that are saved must name the model it started from wherever they are read."""
    if not config.finetune.checkpoint:
        return config
    path = absolute(config.finetune.checkpoint)
    return dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, checkpoint=path))


def _train(
    parts: Parts, ready: _Ready, iterator: Any, lock: workdir.RunLock, report: Report, stop: StopRequest
) -> Result:
    config, tokenizer = parts.config, ready.tokenizer
    abstract = abstract_state(parts.structure, parts.optimizer, parts.shardings)
    start = _new_state(parts) if parts.structure.has_frozen or not ready.resumes else None
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
    _open_workdir(parts, None if ready.resumes else tokenizer, files, step, lock)
    fingerprints = checkpoint.Fingerprints(ready.text, workdir.tokenizer_fingerprint(config.workdir))
    log = MetricsLog(
        files.directory,
        step,
        config.train.steps,
        float(step_flops(config).needed),
        report,
        restored.metrics,
    )
    saver = checkpoint.Checkpoints(config, restored, frozen, fingerprints, log.message)
    try:
        return _Run(parts, tokenizer, files, log, saver, stop).run(state, step, iterator)
    finally:
        saver.close()
        log.close()


def _prepare(config: Config, partition: Partition) -> _Ready:
    """Check everything that can be checked without computing, in the order of what it costs."""
    check_remote(config.workdir, "config.workdir")
    sharding.check_fit(config, partition)
    resumes = checkpoint.has_checkpoint(config)
    tokenizer = _tokenizer(config, resumes)
    text = check_data(config.data, config.model.vocabulary_size, tokenizer)
    require(text == agree_on(text), "the training text is not the same as that of process 0: give all hosts the same")
    require_shared(config.workdir, "config.workdir")
    return _Ready(resumes, tokenizer, text)


def _tokenizer(config: Config, resumes: bool) -> Tokenizer:
    """The tokenizer of the run that goes on; of a new one, what the settings say."""
    if resumes:
        return restore_tokenizer(workdir.tokenizer_directory(config.workdir))
    if config.data.tokenizer == "checkpoint":
        check_base(config.finetune.checkpoint)
        return restore_tokenizer(workdir.base_tokenizer_directory(config))
    check_vocabulary(config.data, config.model.vocabulary_size)
    if config.data.tokenizer != "train":
        return load_tokenizer(config.data, config.workdir)
    return _learn_tokenizer(config)


def _learn_tokenizer(config: Config) -> Tokenizer:
    """A tokenizer that process 0 learns, in a directory of its own: nothing is sure yet."""
    with tempfile.TemporaryDirectory() as directory:
        if jax.process_index() == 0:
            load_tokenizer(config.data, directory)
        for name, text in agree_on(
            {file.name: file.read_text(encoding="utf-8") for file in Path(directory).iterdir()}
        ).items():
            Path(directory, name).write_text(text, encoding="utf-8")
        return restore_tokenizer(directory)


def _new_state(parts: Parts) -> TrainState:
    """The state before the first step, made in place on the devices."""
    config, structure = parts.config, parts.structure
    known = load_base(config, structure, parts.mesh) if config.finetune.checkpoint else {}
    initialise = jax.jit(
        lambda seed, known: initial_state(structure, parts.optimizer, seed, known), out_shardings=parts.shardings
    )
    return settled(initialise(jnp.uint32(config.train.seed), known))


def _open_workdir(parts: Parts, new: Tokenizer | None, files: LocalFiles, step: int, lock: workdir.RunLock) -> None:
    """Write down what the run is: its settings, and its tokenizer if that is new."""
    if jax.process_index() != 0:
        return
    shapes, _ = jax.eval_shape(parts.structure.initialise, jnp.uint32(0))
    count = sum(math.prod(shape.shape) for shape in jax.tree.leaves(shapes))
    try:
        epath.Path(parts.config.workdir).mkdir(parents=True, exist_ok=True)
        lock.take()
        if new is not None:
            new.save(workdir.tokenizer_directory(parts.config.workdir))
            workdir.keep_tokenizer_files(parts.config)
        write_run_record(files.directory, parts.config, step, count)
    except OSError as error:
        raise ConfigError(f"cannot write to config.workdir={parts.config.workdir}: {error.strerror}") from error


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
        self._parts, self._tokenizer, self._log, self._saver, self._stop = parts, tokenizer, log, saver, stop
        self._train, self._files = parts.config.train, files
        self._feed = parts.feed
        self._evaluate_batch: Any = None
        self._bytes_per_token: float | None = None
        self._tracing = False

    def run(self, state: TrainState, start: int, iterator: Iterator) -> Result:
        """Train from step `start` to the end, or until asked to stop."""
        steps = self._train.steps
        if start:
            self._log.message(f"resumed from the checkpoint of step {start}")
        elif self._parts.config.finetune.checkpoint and self._train.evaluate_every:
            self._validate(0, state)  # What the model can do before it is changed further.
        update: Any = self._compile(state) if start < steps else None
        self._log.restart_clock()
        with self._stop.saving():
            return self._steps(update, state, start, iterator)

    def _steps(self, update: Any, state: TrainState, start: int, iterator: Iterator) -> Result:
        steps = self._train.steps
        for step in range(start + 1, steps + 1):
            self._profile(step - start)
            state, metrics = settled(update(state, self._to_devices(next(iterator))))
            self._log.add(step, metrics)
            if self._is_told_to_stop(step):
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
        loss = validation.get("objective", validation["validation_loss"]) if validation else None
        self._saver.save(step, state, iterator, loss, self._log.checksum)
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
            values = self._evaluate(state)
            self._log.write_validation(step, values)
            self._log.message(f"step {step}: {describe(values)}")
            found = values
        self._log.restart_clock()
        return {name: value for name, value in found.items() if name != "step"}

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        config, tokenizer = self._parts.config, self._tokenizer
        if self._evaluate_batch is None:
            parts, settings = self._parts, dataclasses.replace(self._parts.loss_settings, z_loss=0.0)
            make_loss = medusa_evaluation if self._has_heads else language_model_loss
            loss = make_loss(parts.structure, settings, parts.partition)
            self._evaluate_batch = make_evaluation_step(loss, parts.shardings, parts.partition)
            self._bytes_per_token = validation_bytes_per_token(config.data, tokenizer)
        sums = []
        with contextlib.closing(validation_batches(config.data, tokenizer, self._feed.own)) as batches:
            for batch in itertools.islice(batches, self._train.evaluate_batches or None):
                trees = state.parameters, state.frozen, state.constants
                sums.append(settled(self._evaluate_batch(*trees, self._to_devices(batch))))
        fetched = jax.device_get(sums)
        nll, weight = (np.sum([getattr(s, name) for s in fetched], dtype=np.float64) for name in ("nll", "weight"))
        assert self._bytes_per_token is not None
        values = validation_values(float(nll), float(weight), float(weight) * self._bytes_per_token)
        return values | head_values(fetched) if self._has_heads else values

    @property
    def _has_heads(self) -> bool:
        """Whether this run trains Medusa heads."""
        return self._parts.config.finetune.objective == "medusa"

    def _to_devices(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return self._feed({name: batch[name] for name in _BATCH_TYPES})

    def _compile(self, state: TrainState) -> Any:
        """The training step, compiled ahead, which tells its memory."""
        parts = self._parts
        begin = time.perf_counter()
        compiled = make_step(parts).lower(state, abstract_batch(parts)).compile()
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        seconds = time.perf_counter() - begin
        self._log.message(
            f"{_count_parameters(parts.structure)} on {devices}; compiled in {seconds:.0f} s{_memory(compiled)}"
        )
        return compiled

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

    def _finish(self, step: int, *, interrupted: bool, validation: Mapping[str, float] | None = None) -> Result:
        self._saver.wait()
        self._log.close()
        if jax.process_index() == 0:
            try:
                draw_learning_curve(self._files.directory)
                if validation is not None and self._has_heads:
                    self._log.message(
                        write_best_tree(self._files.directory, self._parts.config.finetune.medusa, validation)
                    )
            except OSError as error:
                self._log.message(f"warning: {self._files.directory} cannot be written to ({error.strerror or error})")
        self._publish()
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
    """One line for `validation_values`, and for `head_values` where they are there too."""
    line = (
        f"validation loss {values['validation_loss']:.4f}, perplexity {values['perplexity']:.3f}, "
        f"bits-per-byte {values['bits_per_byte']:.4f}"
    )
    return f"{line}, {describe_heads(values)}" if "objective" in values else line


def _memory(compiled: Any) -> str:
    """What a compiled step needs on each device, where the backend tells."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return ""
    used = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    return f", {used / 2**20:,.0f} MiB a device"
