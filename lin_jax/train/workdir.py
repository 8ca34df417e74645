"""Where a run keeps what in its directory, and its checkpoints as they are opened to be read."""

from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from lin_jax.experiment import Config
from lin_jax.paths import absolute, copy_file

# Where a run keeps the tokenizer's files as they came from Hugging Face, inside of its own tokenizer's directory.
KEPT_TOKENIZER = "hugging_face"


def checkpoints_directory(workdir: str) -> epath.Path:
    """Where a run keeps its checkpoints."""
    return epath.Path(absolute(workdir)) / "checkpoints"


def tokenizer_directory(workdir: str) -> epath.Path:
    """Where a run keeps its tokenizer."""
    return epath.Path(absolute(workdir)) / "tokenizer"


def is_run(path: str) -> bool:
    """Whether there is a run, or one of its checkpoints."""
    workdir, step = workdir_and_step(path)
    directory = checkpoints_directory(workdir)
    return (directory if step is None else directory / str(step)).is_dir()


def tokenizer_files(path: str) -> epath.Path:
    """The directory with a run's tokenizer, in Hugging Face's form where it came in that."""
    kept = tokenizer_directory(workdir_and_step(path)[0])
    return kept / KEPT_TOKENIZER if (kept / KEPT_TOKENIZER).is_dir() else kept


def base_tokenizer_directory(config: Config) -> epath.Path:
    """Where the tokenizer of `finetune.checkpoint` is."""
    return tokenizer_directory(workdir_and_step(config.finetune.checkpoint)[0])


def keep_tokenizer_files(config: Config) -> None:
    """Copy the files of the base model's tokenizer as they came from Hugging Face, chat template included."""
    kept = base_tokenizer_directory(config) / KEPT_TOKENIZER
    if config.data.tokenizer == "checkpoint" and kept.is_dir():
        target = tokenizer_directory(config.workdir) / KEPT_TOKENIZER
        for file in kept.iterdir():
            copy_file(file, target / file.name)


def workdir_and_step(path: str) -> tuple[str, int | None]:
    """A run's directory, and which of its checkpoints is meant: `RUN/checkpoints/STEP`, or None for `RUN`."""
    place = epath.Path(path)
    if place.parent.name == "checkpoints" and place.name.isdigit():
        return str(place.parent.parent), int(place.name)
    return path, None


def reader(directory: epath.Path) -> Any:
    """The checkpoints in a directory, not to be written."""
    return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True, create=False))


def saved_steps(manager: Any) -> list[int]:
    """The steps of the checkpoints, newest first."""
    return sorted(manager.all_steps(), reverse=True)


def read_meta(manager: Any, step: int) -> Mapping[str, Any]:
    """What a checkpoint says of itself: settings, checksums."""
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
