"""The start of a run: what is checked and made before the first step."""

import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath

from lin_jax.data.checks import check_vocabulary
from lin_jax.data.tokenizers import Tokenizer, load_tokenizer, restore_tokenizer
from lin_jax.experiment import Config
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.layers.partition import Partition
from lin_jax.paths import LocalFiles, absolute, check_remote
from lin_jax.settings.base import ConfigError, first_line, require
from lin_jax.tasks.registry import task_of
from lin_jax.train import checkpoint, sharding, workdir
from lin_jax.train.base import base_tokenizer, keep_tokenizer_files, with_settings_of_base
from lin_jax.train.distributed import agree_on, require_shared, settled
from lin_jax.train.parts import Parts
from lin_jax.train.record import write_run_record
from lin_jax.train.saved_model import load_base, load_teachers
from lin_jax.train.state import TrainState, initial_state

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Ready:
    """What was found before anything is computed: `text` is the fingerprint of what is trained on."""

    resumes: bool
    tokenizer: Tokenizer
    text: str


def completed(config: Config) -> Config:
    """Return settings that name the model to start from wherever they are read, with what it and the data decide."""
    if config.finetune.checkpoint:
        path = absolute(config.finetune.checkpoint)
        config = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, checkpoint=path))
    found = task_of(with_settings_of_base(config)).complete()
    assert isinstance(found, Config)
    return found


def prepare(config: Config, partition: Partition) -> Ready:
    """Check everything that can be checked without computing, in the order of what it costs."""
    check_remote(config.workdir, "config.workdir")
    sharding.check_fit(config, partition)
    resumes = checkpoint.has_checkpoint(config)
    tokenizer = _tokenizer(config, resumes)
    text = task_of(config).check_data(tokenizer)
    require(text == agree_on(text), "the training text is not the same as that of process 0: give all hosts the same")
    require_shared(config.workdir, "config.workdir")
    return Ready(resumes, tokenizer, text)


def _tokenizer(config: Config, resumes: bool) -> Tokenizer:
    """The tokenizer of the run that goes on; of a new one, what the settings say."""
    if resumes:
        return restore_tokenizer(workdir.tokenizer_directory(config.workdir))
    if config.data.tokenizer == "checkpoint":
        return base_tokenizer(config.finetune.checkpoint)
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


def new_state(parts: Parts, report: Report = lambda line: None) -> TrainState:
    """Return the state before the first step, made in place on the devices; `report` is told what is new in a base."""
    config, structure = parts.config, parts.structure
    known = load_base(config, structure, parts.mesh) if config.finetune.checkpoint else {}
    wanted = parameters_by_path(structure.abstract_parameters)
    added = sorted(name for name in wanted.keys() - known.keys() if name.partition(".")[0] in parts.task.adds)
    if known and added:
        report(f"new, with random values, as finetune.checkpoint has none that fit: {', '.join(added)}")
    known |= load_teachers(parts.task, parts.mesh)
    initialise = jax.jit(
        lambda seed, known: initial_state(structure, parts.optimizer, seed, known), out_shardings=parts.shardings
    )
    return settled(initialise(jnp.uint32(config.train.seed), known))


def open_workdir(parts: Parts, new: Tokenizer | None, files: LocalFiles, step: int, lock: workdir.RunLock) -> None:
    """Write down what the run is: its settings, and its tokenizer if that is new.

    Raises:
        ConfigError: nothing can be written there.
    """
    if jax.process_index() != 0:
        return
    shapes, _ = jax.eval_shape(parts.structure.initialise, jnp.uint32(0))
    count = sum(math.prod(shape.shape) for shape in jax.tree.leaves(shapes))
    try:
        epath.Path(parts.config.workdir).mkdir(parents=True, exist_ok=True)
        lock.take()
        if new is not None:
            new.save(workdir.tokenizer_directory(parts.config.workdir))
            keep_tokenizer_files(parts.config)
        write_run_record(files.directory, parts.config, step, count)
    except OSError as error:
        raise ConfigError(
            f"cannot write to config.workdir={parts.config.workdir} ({first_line(error)}): see to that, or choose "
            "another one"
        ) from error
