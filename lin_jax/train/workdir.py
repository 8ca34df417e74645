"""Where a run keeps what in its directory, and its checkpoints as they are opened to be read."""

import fcntl
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lin_jax.experiment import Config, config_from_dict
from lin_jax.paths import absolute, is_remote
from lin_jax.settings.base import ConfigError, require
from lin_jax.settings.foreign import read_json
from lin_jax.train.manifest import DamagedError, require_undamaged

# Where a run keeps the tokenizer's files and the config.json as they came from Hugging Face, inside of its own
# tokenizer's directory.
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


def tokenizer_fingerprint(workdir: str) -> str:
    """Return a checksum of the names and contents of all files that a run keeps of its tokenizer."""
    directory, found = tokenizer_directory(workdir), hashlib.sha256()
    for place in (directory, directory / KEPT_TOKENIZER):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            # What begins with a dot was left by a kill.
            if not file.name.startswith(".") and not file.is_dir():
                content = file.read_bytes()
                found.update(f"{place.name} {file.name} {len(content)} ".encode() + content)
    return found.hexdigest()


class RunLock:
    """Keeps a run's directory to one run at a time. The system lifts it when the process ends, however it ends."""

    def __init__(self, workdir: str):
        """Take nothing yet."""
        self._workdir: str = workdir
        self._descriptor: int | None = None

    def take(self) -> None:
        """Take the lock, unless it is taken, the directory is not there, or its file system knows no locks.

        Raises:
            ConfigError: another run has it.
        """
        if self._descriptor is not None or is_remote(self._workdir) or jax.process_index() != 0:
            return
        if not os.path.isdir(self._workdir):
            return
        try:
            descriptor = os.open(self._workdir, os.O_RDONLY)
        except OSError:  # Whoever reads or writes it says so.
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ConfigError(
                f"another run is at work in config.workdir={self._workdir}: wait for its end, or choose another one"
            ) from error
        except OSError:  # Some network file systems.
            os.close(descriptor)
            return
        self._descriptor = descriptor

    def close(self) -> None:
        """Give the lock back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


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


def read_settings(path: str) -> Config:
    """Return the settings of a run; raise `ConfigError` where there is none."""
    workdir, step = workdir_and_step(path)
    with reader(checkpoints_directory(workdir)) as manager:
        steps = [step] if step is not None else saved_steps(manager)
        require(bool(steps), f"there is no checkpoint in {path}")
        return config_from_dict(read_meta(manager, steps[0])["config"])


def read_meta(manager: Any, step: int) -> Mapping[str, Any]:
    """Return what a checkpoint says of itself, settings, checksums and fingerprints; raise `DamagedError`."""
    directory = manager.directory / str(step)
    require_undamaged(directory, ("meta",))
    try:
        return read_json(directory / "meta" / "metadata", dict)
    except ConfigError as error:
        raise DamagedError(str(error)) from error
