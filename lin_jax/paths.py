"""Paths that may be remote, such as gs://BUCKET/DIRECTORY, and local files that stand for theirs.

`etils.epath` reads and writes both kinds, and so do checkpoints. What needs a file of its own (appended lines, a memory
map, a tokenizer's library) works on a local copy.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from etils import epath

from lin_jax.settings.base import ConfigError, first_line, require

# Checkpoints can be in no other remote place.
SCHEME = "gs://"
# What etils and the checkpoint library reach it with.
_NEEDED = "gcsfs"


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is not one of this machine's files."""
    return "://" in str(path)


def absolute(path: str) -> str:
    """A path that means the same from everywhere."""
    return path if is_remote(path) else str(Path(path).absolute())


def check_remote(path: str, name: str) -> None:
    """Raise `ConfigError` unless `path`, the value of the setting `name`, is local or can be reached."""
    if not is_remote(path):
        return
    require(path.startswith(SCHEME), f"{name}: {path} is neither local nor does it begin with {SCHEME}")
    try:
        epath.Path(path).exists()
    except ImportError as error:
        raise ConfigError(f"{name}: {path} needs {_NEEDED}: pip install {_NEEDED}") from error
    except Exception as error:  # of whatever library speaks to it
        raise ConfigError(f"{name}: {path} cannot be reached: {first_line(error)}") from error


def require_writable(file: epath.PathLike, name: str) -> None:
    """Raise `ConfigError` unless a file can be written later, as far as that can be known; `name` is its setting's."""
    if is_remote(file):
        return
    path = Path(file).absolute()
    require(not path.is_dir(), f"{name} {file} is a directory: give a file")
    require(path.is_file() or not path.exists(), f"{name} {file} is not a file: give another")
    require(path.parent.is_dir(), f"{name} {file}: there is no directory {Path(file).parent}")
    require(os.access(path.parent, os.W_OK | os.X_OK), f"{name} {file}: {Path(file).parent} may not be written to")


def copy_file(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copy a file, either of which may be remote."""
    epath.Path(target).parent.mkdir(parents=True, exist_ok=True)
    with epath.Path(source).open("rb") as read, epath.Path(target).open("wb") as write:
        shutil.copyfileobj(read, write)


def write_whole(path: epath.PathLike, content: bytes) -> None:
    """Write a file so that it holds all of `content` or what it held before, at whatever moment the process ends.

    A file that holds that already is left alone. The temporary file has always the same name, so that a start after a
    kill writes over what that left.

    Raises:
        OSError: it cannot be written.
    """
    path = epath.Path(path)
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if not is_remote(path):
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def copy_directory(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copy all files of a directory and of those in it."""
    for path in epath.Path(source).iterdir():
        copy = copy_directory if path.is_dir() else copy_file
        copy(path, epath.Path(target) / path.name)


class LocalFiles:
    """The files of a directory as files of this machine.

    Attributes:
        directory: the directory itself where it is local; else one that `publish` copies there.
    """

    def __init__(self, directory: str, wanted: Iterable[str] = ()):
        """Of a remote directory, only the files `wanted` are there at first."""
        self._remote = epath.Path(directory) if is_remote(directory) else None
        self.directory, self._published = Path(directory), dict[Path, tuple[int, int]]()
        if self._remote is not None:
            self._temporary = tempfile.TemporaryDirectory()
            self.directory = Path(self._temporary.name, self._remote.name)
            self.directory.mkdir()
            for name in wanted:
                if (self._remote / name).exists():
                    copy_file(self._remote / name, self.directory / name)

    def publish(self) -> None:
        """Copy what has changed since the last time."""
        if self._remote is None:
            return
        for file in self.directory.rglob("*"):
            state = file.stat().st_mtime_ns, file.stat().st_size
            if file.is_file() and self._published.get(file) != state:
                copy_file(file, self._remote / file.relative_to(self.directory).as_posix())
                self._published[file] = state
