"""Text files: which ones a pattern means, what their suffixes say, and a seekable copy of compressed ones.

Training reads documents in a random order, and a .gz or .zst stream can only be read from its start. So a compressed
file is uncompressed once into `data.cache_directory`, and a remote one copied there, under a name made from its path,
size and time of change; the next run finds it there.
"""

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import os
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard
from etils import epath

from lin_jax.paths import check_remote, is_remote
from lin_jax.settings.base import ConfigError, require

PLAIN_SUFFIXES = ("", ".txt", ".text", ".tokens", ".raw", ".md", ".py")
LINES_SUFFIX = ".jsonl"
COMPRESSED_SUFFIXES = (".gz", ".zst")
# Folders of the standard library that are left out: packages that users install, and test suites, which hold files
# in all kinds of encodings and are missing from many installations.
STDLIB_LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of text that can be read from any offset."""

    name: str  # what the user knows it by
    path: str  # where its uncompressed bytes are
    is_lines: bool  # JSON Lines rather than plain text


def text_files(patterns: tuple[str, ...], setting: str, cache_directory: str) -> list[TextFile]:
    """The files that the paths and globs of `setting` mean, in order, compressed ones uncompressed.

    Raises:
        ConfigError: a path or glob matches nothing, a suffix is unknown, or a compressed file is damaged.
    """
    names = dict.fromkeys(name for pattern in patterns for name in _matches(pattern, setting))
    kinds = {name: _is_lines(name) for name in names}
    return [TextFile(name, seekable(name, cache_directory), is_lines) for name, is_lines in kinds.items()]


def stdlib_files() -> list[TextFile]:
    """The modules of this Python's standard library, in sorted order; see `STDLIB_LEFT_OUT` for what is not read."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = (path for path in root.rglob("*.py") if not set(path.relative_to(root).parts) & set(STDLIB_LEFT_OUT))
    return [TextFile(str(path), str(path), is_lines=False) for path in sorted(modules) if path.is_file()]


def _remote_matches(pattern: str, setting: str) -> list[str]:
    check_remote(pattern, setting)
    magic: list[str] = []
    directory = epath.Path(pattern)
    while glob.has_magic(str(directory)):
        directory, magic = directory.parent, [directory.name, *magic]
    found = [path for path in (directory.glob("/".join(magic)) if magic else [directory]) if path.is_file()]
    require(bool(found), f"{setting}: {pattern} matches no file; give text files with --config.{setting}=FILE_OR_GLOB")
    return sorted(map(str, found))


def _matches(pattern: str, setting: str) -> list[str]:
    if is_remote(pattern):
        return _remote_matches(pattern, setting)
    path = os.path.expanduser(pattern)
    require("\0" not in path, f"{setting}: a path holds a NUL character")
    require(not os.path.isdir(path), f"{setting}: {pattern} is a directory; give its files, such as {pattern}/*.txt")
    found = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, _glob(path)))
    problem = "matches no file" if glob.has_magic(pattern) else "does not exist"
    problem = "is not a file" if os.path.lexists(path) else problem
    require(bool(found), f"{setting}: {pattern} {problem}; give text files with --config.{setting}=FILE_OR_GLOB")
    for name in found:
        require(os.access(name, os.R_OK), f"{setting}: {name} may not be read; change its permissions")
    return found


def _glob(pattern: str) -> Iterator[str]:
    """Yield the paths that a glob matches. Below ** each directory counts once, also where links make a circle."""
    pattern += os.sep + "*" if pattern.endswith(os.sep + "**") or pattern == "**" else ""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    place = parts.index("**")
    before, after = os.sep.join([*parts[:place], ""]), os.sep.join(parts[place + 1 :])
    seen: set[str] = set()
    for top in sorted(glob.iglob(before)) if before else [""]:
        for directory in _directories(top or os.curdir, seen):
            # Names in the working directory begin without ./ as those of other globs do.
            yield from _glob(os.path.join(glob.escape(directory if top else directory[2:]), after))


def _directories(top: str, seen: set[str]) -> Iterator[str]:
    """Yield a directory and those below it but for hidden ones, each once by its real path, which `seen` keeps."""
    for directory, below, _ in os.walk(top, followlinks=True):
        real = os.path.realpath(directory)
        below[:] = [] if real in seen else sorted(name for name in below if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            yield directory


def _is_lines(name: str) -> bool:
    stem, suffix = os.path.splitext(os.path.basename(name).lower())
    if suffix in COMPRESSED_SUFFIXES:
        suffix = os.path.splitext(stem)[1]
    known = ", ".join((LINES_SUFFIX, *filter(None, PLAIN_SUFFIXES)))
    require(
        suffix in (LINES_SUFFIX, *PLAIN_SUFFIXES),
        f"{name}: unknown suffix {suffix!r}; text files end in {known} or nothing, plain or with .gz or .zst",
    )
    return suffix == LINES_SUFFIX


def seekable(name: str, cache_directory: str) -> str:
    """Path of the uncompressed bytes of a file, which are written to `cache_directory` if it is compressed or remote.

    Raises:
        ConfigError: the compressed file is damaged, or the cache directory can't be written.
    """
    suffix = os.path.splitext(name.lower())[1]
    if suffix not in COMPRESSED_SUFFIXES and not is_remote(name):
        return name
    copy = cache_path(name, cache_directory, "text", ".text")
    if not copy.exists():
        uncompress = {".gz": _gunzip, ".zst": _unzstd}.get(suffix, shutil.copyfileobj)
        write_atomically(copy, lambda target: _uncompress(name, uncompress, target))
    return str(copy)


def cache_path(name: str, cache_directory: str, purpose: str, suffix: str) -> Path:
    """Where something made from a file is kept: another name as soon as the file changes."""
    require(not is_remote(cache_directory), f"data.cache_directory must be local, but is {cache_directory}")
    if is_remote(name):
        remote = epath.Path(name).stat()
        identity = (name, remote.length, remote.mtime, purpose)
    else:
        status = os.stat(name)
        identity = (os.path.realpath(name), status.st_size, status.st_mtime_ns, purpose)
    return Path(cache_directory).expanduser() / (hashlib.sha256(repr(identity).encode()).hexdigest()[:32] + suffix)


def write_atomically(target: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file of the cache under a name of its own and rename it when it is whole.

    Raises:
        ConfigError: the directory can't be written or is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target.parent) as file:
            write(file)
            file.flush()
            os.replace(file.name, target)
    except OSError as error:
        raise ConfigError(f"cannot write to {target.parent} ({error}); set data.cache_directory") from error


@contextlib.contextmanager
def _temporary(directory: Path) -> Iterator[BinaryIO]:
    with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
        try:
            yield file  # type: ignore[misc]
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)


def _uncompress(name: str, uncompress: Callable[[BinaryIO, BinaryIO], None], target: BinaryIO) -> None:
    try:
        with epath.Path(name).open("rb") as source:
            uncompress(source, target)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ConfigError(f"{name} is damaged or not what its suffix says: {error}") from error


def _gunzip(source: BinaryIO, target: BinaryIO) -> None:
    with gzip.GzipFile(fileobj=source) as stream:
        while block := stream.read(_BLOCK):
            target.write(block)


def _unzstd(source: BinaryIO, target: BinaryIO) -> None:
    # Frame by frame, because zstandard's stream reader takes a file that was cut off for a shorter one.
    frame = None
    while block := source.read(_BLOCK):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            target.write(frame.decompress(block))
            block = frame.unused_data
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")
