"""What damage to any file of a run does: python -m benchmarks.damage --directory runs/damage

Trains a very small model, and stops it with two checkpoints and some steps to go. Then, for each of its files and each
kind of damage (deleted, emptied, halved, a flipped byte at the start, in the middle and at the end, bytes appended,
something of the other sort in its place), damages a copy and resumes it. What comes out is compared bit for bit with a
run that was not damaged: parameters, optimizer, position in the data, tokenizer, metrics. Started again with the same
directory, it goes on where it was stopped.
"""

import argparse
import contextlib
import dataclasses
import gc
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

import train as train_program
from benchmarks.resume import Experiment
from lin_jax.train.stop import StopRequest

STEPS, STOPPED = 5, 3
OVERRIDES = (
    "optimizer.warmup_steps=1",
    f"train.steps={STEPS}",
    "train.log_every=1",
    "train.evaluate_every=2",
    "train.evaluate_batches=1",
    "checkpoint.every=1",
    "data.tokenizer=train",
    "data.tokenizer_vocabulary=257",
)
SAME, WARNED, REFUSED = "the same result", "the same result but for metrics, with a line", "refused in a line"
TRACEBACK, UNNOTICED = "a traceback", "another result, unnoticed"


class _StopAt(StopRequest):
    """Asks to stop when a number of steps has been reported."""

    def __init__(self, steps: int):
        self._steps = steps

    @property
    def requested(self) -> bool:
        self._steps -= 1
        return self._steps == 0


def _flip(place: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[place(len(content))] ^= 1
        file.write_bytes(content)

    return damage


def _replace_by_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _replace_by_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("x", encoding="utf-8")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "emptied": lambda file: file.write_bytes(b""),
    "halved": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped at the start": _flip(lambda size: 0),
    "flipped in the middle": _flip(lambda size: size // 2),
    "flipped at the end": _flip(lambda size: size - 1),
    "appended": lambda file: file.write_bytes(file.read_bytes() + b"more"),
    "a directory in its place": _replace_by_directory,
}
DIRECTORY_DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted": shutil.rmtree,
    "a file in its place": _replace_by_file,
}


@dataclasses.dataclass(frozen=True)
class Resumed:
    """How a start ended: its exit code or exception, what it printed, and what the run came to."""

    end: str
    output: str
    result: str
    metrics: str


class Damages:
    """A run that was stopped, and copies of it that are damaged and resumed."""

    def __init__(self, directory: Path):
        """Train in `directory`, unless that was done."""
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        Experiment(directory, steps=2 * STEPS)
        self.stopped, self._copy = directory / "stopped", directory / "copy" / "run"
        if not (directory / "whole.json").exists():
            shutil.rmtree(self.stopped, ignore_errors=True)
            end = self._start(self.stopped, _StopAt(STOPPED))
            if f"stopped at step {STOPPED}" not in end.output:
                raise RuntimeError(f"the run was not stopped at step {STOPPED}: {end.end}\n{end.output}")
            (directory / "whole.json").write_text(json.dumps(dataclasses.asdict(self._resumed())), encoding="utf-8")
        self.whole = Resumed(**json.loads((directory / "whole.json").read_text(encoding="utf-8")))
        if "finished" not in self.whole.output:
            raise RuntimeError(f"the run cannot go on: {self.whole.output}")

    def paths(self) -> Iterator[tuple[Path, dict[str, Callable[[Path], None]]]]:
        """Yield what can be damaged, relative to the run's directory, with the ways to do it."""
        for path in sorted(self.stopped.rglob("*")):
            yield path.relative_to(self.stopped), DIRECTORY_DAMAGES if path.is_dir() else DAMAGES
        yield Path("unreadable_checkpoints"), {"a file in its place": lambda path: None}

    def outcome(self, path: Path, damage: Callable[[Path], None]) -> tuple[str, Resumed]:
        """Damage a copy, resume it and say what came of it."""
        found = self._resumed(path, damage)
        if "Traceback" in found.output or found.end not in ("0", "2"):
            return TRACEBACK, found
        lines = found.output.splitlines()
        if found.end == "2":
            return (REFUSED if len([line for line in lines if line.startswith("error: ")]) == 1 else TRACEBACK), found
        if found.result != self.whole.result:
            return UNNOTICED, found
        if found.metrics != self.whole.metrics:
            return (WARNED if any(line.startswith("warning: ") for line in lines) else UNNOTICED), found
        return SAME, found

    def _resumed(self, path: Path | None = None, damage: Callable[[Path], None] | None = None) -> Resumed:
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self.stopped, self._copy)
        if path is not None and damage is not None:
            if path.name == "unreadable_checkpoints":
                # The folder matters only when there is something to put into it.
                (self._copy / path).write_text("x", encoding="utf-8")
                newest = self._copy / "checkpoints" / str(STOPPED) / "data" / "metadata"
                newest.write_bytes(b"")
            else:
                damage(self._copy / path)
        return self._start(self._copy, None)

    def _start(self, workdir: Path, stop: StopRequest | None) -> Resumed:
        """Run the program here, for it takes seconds to start; all that it and its libraries print is caught."""
        arguments = ["--config", str(self._directory / "config.py"), f"--config.workdir={workdir}"]
        arguments += [f"--config.{override}" for override in OVERRIDES]
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
            with _printing_to(printed.fileno()):
                try:
                    end = str(train_program.main(arguments, stop))
                except BaseException as error:
                    end = f"{type(error).__name__}: {error}"
                    logging.exception("Traceback")
                gc.collect()  # Errors that nobody asked for are printed when they are collected.
            printed.seek(0)
            output = printed.read()
        return Resumed(end, output, _result(workdir), _metrics(workdir / "metrics.jsonl"))


@contextlib.contextmanager
def _printing_to(descriptor: int) -> Iterator[None]:
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(number, os.dup(number)) for number in (1, 2)]
    try:
        for number, _ in saved:
            os.dup2(descriptor, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)


def _result(workdir: Path) -> str:
    """Return all that a run has learned and would go on with, or why there is none."""
    newest = workdir / "checkpoints" / str(STEPS)
    try:
        meta = json.loads((newest / "meta" / "metadata").read_text(encoding="utf-8"))
        files = sorted(file for file in (workdir / "tokenizer").iterdir())
        tokenizer = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
        steps = sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.is_dir())
        return json.dumps(
            [meta["checksums"], (newest / "data" / "metadata").read_text(encoding="utf-8"), tokenizer, steps]
        )
    except OSError as error:
        return f"none: {type(error).__name__}"


def _metrics(file: Path) -> str:
    """Return what metrics say but for the time it took."""
    times = ("step_seconds", "tokens_per_second", "mfu")
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    except (OSError, ValueError) as error:
        return f"none: {type(error).__name__}"
    return json.dumps([{name: value for name, value in line.items() if name not in times} for line in lines])


def main() -> None:
    """Try all damages that have not been tried; print those that are not harmless, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="runs/damage", help="of the runs and of results.jsonl")
    parser.add_argument("--only", default="", help="try only paths that contain this")
    known = parser.parse_args()
    directory, begin = Path(known.directory), time.perf_counter()
    jax.config.update("jax_compilation_cache_dir", str((directory / "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    damages = Damages(directory)
    results = directory / "results.jsonl"
    done = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
    known_cases = {(line["path"], line["damage"]) for line in done}
    for path, ways in damages.paths():
        for name, damage in ways.items():
            if (str(path), name) in known_cases or known.only not in str(path):
                continue
            outcome, found = damages.outcome(path, damage)
            line = {"path": str(path), "damage": name, "outcome": outcome, "output": found.output, "end": found.end}
            done.append(line)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if outcome in (TRACEBACK, UNNOTICED):
                print(f"{path} {name}: {outcome}", flush=True)
    counts = Counter(line["outcome"] for line in done)
    fallen_back = sum("trying the one before it" in line["output"] for line in done)
    print(f"{len(done)} damages to {len({line['path'] for line in done})} files and folders ({known.directory}):")
    for outcome in (SAME, WARNED, REFUSED, TRACEBACK, UNNOTICED):
        print(f"  {counts[outcome]} {outcome}")
    print(f"{fallen_back} of them resumed from the checkpoint before")
    print(f"{time.perf_counter() - begin:.0f} s, jax {jax.__version__}")
    sys.exit(bool(counts[TRACEBACK] or counts[UNNOTICED]))


if __name__ == "__main__":
    main()
