"""The files of a checkpoint with their sizes and checksums: damage is found before a library reads any of them.

`manifest.json` is written by process 0 when all processes have written their files, right before the checkpoint gets
its name. So a complete checkpoint has one, unless it is of an earlier version; those are read unchecked. What is read
is checked by all processes, each its share of the files.

A pass reads every byte once, some files at a time. CRC-32 finds any change of up to 32 bits in a row, and other damage
but for one in 2**32; it takes a quarter of a second per gigabyte and core.
"""

import json
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import orbax.checkpoint as ocp
from etils import epath

from lin_jax.settings.base import first_line
from lin_jax.train.distributed import any_process

MANIFEST = "manifest.json"
# What the library adds to the name of a checkpoint that is not complete, where it can rename directories.
UNFINISHED = ".orbax-checkpoint-tmp"
_BLOCK_BYTES = 1 << 22
_THREADS = 8
# All processes wait for the one that writes the manifest, after they have waited for the slowest to write its files.
_PATIENCE_SECONDS = 3600


class DamagedError(Exception):
    """A checkpoint does not hold the bytes that were written."""


def saving_options(directory: epath.Path, step: Callable[[], int]) -> ocp.options.AsyncOptions:
    """Return the options with which the library writes a manifest into the checkpoint of `step()` in `directory`."""

    def note_files() -> None:
        temporary = directory / f"{step()}{UNFINISHED}"
        write_manifest(temporary if temporary.exists() else directory / str(step()))

    return ocp.options.AsyncOptions(timeout_secs=_PATIENCE_SECONDS, post_finalization_callback=note_files)


def write_manifest(directory: epath.Path) -> None:
    """Note the files of all items of a checkpoint; the library's own beside the items is still to change."""
    names = sorted(name for item in directory.iterdir() if item.is_dir() for name in _names(item, f"{item.name}/"))
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(_sum_of_file, [directory / name for name in names])
        found = dict(zip(names, sums, strict=True))
    (directory / MANIFEST).write_text(json.dumps(found, indent=0), encoding="utf-8")


def require_undamaged(directory: epath.Path, items: Collection[str]) -> None:
    """Raise `DamagedError` unless the files of these items of a checkpoint are as they were written.

    All processes raise if one does; all of them must call it.
    """
    problem = ""
    try:
        _check_share(directory, items)
    except Exception as error:  # Damage shows as nearly any type of error.
        problem = first_line(error)
    if any_process(bool(problem)):
        raise DamagedError(problem or "another process found a damaged file")


def _check_share(directory: epath.Path, items: Collection[str]) -> None:
    """Raise an error unless this process's share of the files is as the manifest says, where there is one."""
    if not (directory / MANIFEST).exists():
        return
    try:
        noted = {name: (int(size), int(crc)) for name, (size, crc) in json.loads(_text(directory / MANIFEST)).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} is damaged") from error
    wanted = sorted(name for name in noted if name.split("/")[0] in items)
    own = wanted[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, found in zip(own, pool.map(_sum_of_file, [directory / name for name in own]), strict=True):
            if found != noted[name]:
                raise DamagedError(f"{name} does not have the size and checksum that it was saved with")


def _text(file: epath.Path) -> str:
    return file.read_bytes().decode()


def _sum_of_file(file: epath.Path) -> tuple[int, int]:
    """Return a file's size and CRC-32."""
    size = crc = 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _names(directory: epath.Path, prefix: str) -> Iterator[str]:
    """Yield the paths of all files in a directory and those in it, after `prefix`."""
    for path in directory.iterdir():
        if path.is_dir():
            yield from _names(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name
