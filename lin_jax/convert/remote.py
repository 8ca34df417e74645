"""Models in remote directories: their libraries read files of this machine, so they are copied here first."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from etils import epath

from lin_jax.paths import check_remote, copy_directory, copy_file
from lin_jax.settings.base import require
from lin_jax.train.workdir import checkpoints_directory, is_run, reader, saved_steps, workdir_and_step

# Items of a checkpoint that are only needed to train on.
_OF_TRAINING = ("training", "data")


@functools.cache
def fetched(source: str) -> Path:
    """A copy of a remote model, which lasts as long as this process.

    Of a run it holds one checkpoint, without the state of its training.

    Raises:
        ConfigError: there is no such model, or it cannot be reached.
    """
    check_remote(source, "the model")
    require(epath.Path(source).exists(), f"{source} does not exist")
    copy = Path(tempfile.mkdtemp(prefix="lin_jax_"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    if is_run(source):
        return _fetch_run(source, copy)
    if epath.Path(source).is_dir():
        copy_directory(source, copy)
        return copy
    copy_file(source, copy / epath.Path(source).name)
    return copy / epath.Path(source).name


def _fetch_run(source: str, copy: Path) -> Path:
    workdir, step = workdir_and_step(source)
    for path in epath.Path(workdir).iterdir():
        if path.is_file():
            copy_file(path, copy / path.name)
    if (epath.Path(workdir) / "tokenizer").is_dir():
        copy_directory(epath.Path(workdir) / "tokenizer", copy / "tokenizer")
    with reader(checkpoints_directory(workdir)) as manager:
        wanted = saved_steps(manager)[:1] if step is None else [step]
    for number in map(str, wanted):
        for path in (checkpoints_directory(workdir) / number).iterdir():
            if path.name not in _OF_TRAINING:
                (copy_directory if path.is_dir() else copy_file)(path, copy / "checkpoints" / number / path.name)
    return copy if step is None else copy / "checkpoints" / str(step)
