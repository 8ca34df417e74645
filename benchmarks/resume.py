"""A run that is killed again and again ends as the run that is not: python -m benchmarks.resume --kills 20

Trains a very small model once undisturbed; then again and again, killed by SIGKILL at random moments and started anew
until it ends: at a random one of all its changes to files (a file opened, a directory made, renamed or removed, those
of unfinished checkpoints included), some milliseconds after it, or some time after one of its lines (starting,
compiling, training, evaluating). Then everything in its directory must be the same, file by file, but for times and
logs: names, metrics, tokenizer, picture, and of each checkpoint settings, position in the data and all arrays, bit for
bit. With `--devices 8 1 4` each start has another number of virtual CPU devices, fsdp parts included: losses and
parameters must agree to rounding then, and the data exactly.

Processes are forked from one that has imported everything, so that a start takes a second. With `--directory`, what was
found is kept there, and the same command goes on after it.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

import train as train_program
from lin_jax.train import loop
from lin_jax.train.manifest import MANIFEST, require_undamaged

assert loop  # Imported for the processes that are forked.

ROOT = Path(__file__).parent.parent
BATCH = 8
# Fewer than a run is likely to need to end, so that many are compared.
KILLS_OF_A_RUN = 8
_TIMES = ("step_seconds", "tokens_per_second", "mfu")
_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
CONFIG = """
from lin_jax.experiment import *

def get_config():
    return Config(
        model=FlashConfig(
            vocabulary_size=257, width=16, depth=2, query_key_size=8, rotary_size=4,
            attention=AugmentedConfig(group_size=8, convolution=4),
        ),
        data=DataConfig(source="text", path=({corpus!r},), cache_directory={cache!r}, sequence_length=32,
                        batch_size={batch}),
        optimizer=OptimizerConfig(peak_learning_rate=1e-3, schedule="cosine", warmup_steps=5),
        train=TrainConfig(steps={steps}, evaluate_every=20, evaluate_batches=2, log_every=2),
        checkpoint=CheckpointConfig(every=5),
    )
"""
# A tokenizer with a file of its own, and little time between what can go wrong.
OVERRIDES = ("data.tokenizer=train", "data.tokenizer_vocabulary=257", "train.evaluate_every=4", "checkpoint.every=3")


class Experiment:
    """A very small training in a directory."""

    def __init__(self, directory: Path, steps: int):
        """Write its text and its settings, as everything the runs of one experiment share."""
        self.directory, self.steps = directory, steps
        words = random.Random(0)
        texts = (" ".join(words.choices(["ab", "cde", "f", "gh"], k=words.randint(5, 100))) for _ in range(300))
        corpus = directory / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        values = {"corpus": str(corpus), "cache": str(directory / "cache"), "batch": BATCH, "steps": steps}
        (directory / "config.py").write_text(CONFIG.format(**values), encoding="utf-8")

    @property
    def run(self) -> Path:
        """Where every run is made, so that the settings of all are the same."""
        return self.directory / "run"

    def train(self, devices: int) -> int:
        """Go on with the run in this process, which has done nothing with JAX yet; returns the exit code."""
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_compilation_cache_dir", str(self.directory / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        arguments = [f"workdir={self.run}", f"mesh.fsdp={2 if devices % 2 == 0 else 1}", *OVERRIDES]
        config = ["--config", str(self.directory / "config.py")]
        return train_program.main(config + [f"--config.{argument}" for argument in arguments])


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a process is killed.

    Attributes:
        change: the number of the change to files before which it happens; 0 for none.
        line: the number of the line of output after which it happens, where there is no change.
        seconds: how much later.
    """

    change: int
    line: int
    seconds: float

    @staticmethod
    def draw(chance: random.Random, changes: int, lines: int) -> "Moment":
        """Return a moment of a run that makes so many changes and prints so many lines."""
        if chance.random() < 0.7:
            return Moment(chance.randint(1, changes), 0, chance.choice([0.0, chance.uniform(0.0, 0.02)]))
        return Moment(0, chance.randint(0, lines), chance.uniform(0.0, 0.4))


@dataclasses.dataclass(frozen=True)
class Started:
    """How a start ended: `what` was going on when it was killed, or None if it came to the end of the run."""

    what: str | None
    changes: int
    lines: int


def fork(action: Callable[[], int], output: int) -> int:
    """Run `action` in a process of its own with this output, and return the process."""
    process = os.fork()
    if process:
        return process
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    code = 1
    try:
        code = action()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def start(experiment: Experiment, devices: int, moment: Moment | None) -> Started:
    """Go on with the run until it ends or is killed.

    Raises:
        RuntimeError: it failed.
    """
    read, write = os.pipe()
    counted = experiment.directory / "changes.txt"
    counted.write_text("", encoding="utf-8")

    def action() -> int:
        sys.addaudithook(_Watch(experiment.run, counted, moment))
        return experiment.train(devices)

    process = fork(action, write)
    os.close(write)
    lines: list[str] = []
    with open(read, encoding="utf-8", errors="replace") as output:
        if moment is not None and not moment.change:
            while len(lines) < moment.line and (line := output.readline()):
                lines.append(line)
            time.sleep(moment.seconds)
            os.kill(process, signal.SIGKILL)
        lines += output.readlines()
    _, status = os.waitpid(process, 0)
    changes = counted.read_text(encoding="utf-8").splitlines()
    if os.WIFSIGNALED(status):
        last = lines[-1].strip() if lines else "starting"
        return Started(
            changes[-1] if moment is not None and moment.change and changes else last, len(changes), len(lines)
        )
    if os.WEXITSTATUS(status):
        raise RuntimeError("the run failed:\n" + "".join(lines))
    return Started(None, len(changes), len(lines))


class _Watch:
    """Sees the changes that a process makes to files of its run, and kills it at one of them."""

    def __init__(self, directory: Path, counted: Path, moment: Moment | None):
        self._directory, self._moment, self._count = str(directory), moment, 0
        self._notes = os.open(counted, os.O_WRONLY | os.O_APPEND)
        self._lock = threading.Lock()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not opened and event not in _CHANGES:
            return
        if not isinstance(arguments[0], (str, os.PathLike)) or not str(arguments[0]).startswith(self._directory):
            return
        with self._lock:
            self._count += 1
            place = str(arguments[0]).removeprefix(self._directory)
            os.write(self._notes, f"{event} {place}\n".encode())
            is_now = self._moment is not None and self._count == self._moment.change
        if is_now:
            assert self._moment is not None
            time.sleep(self._moment.seconds)  # Other threads go on meanwhile.
            os.kill(os.getpid(), signal.SIGKILL)


def differences(run: Path, whole: Path, *, exact: bool) -> list[str]:
    """Return the names of what is not the same in two finished runs, files, arrays or values; empty if they agree."""
    found, wanted = (dict(_contents(directory)) for directory in (run, whole))
    names = sorted(found.keys() | wanted.keys())
    return [name for name in names if name not in found or name not in wanted or not _agree(name, found, wanted, exact)]


def _agree(name: str, found: dict[str, Any], wanted: dict[str, Any], exact: bool) -> bool:
    ours, theirs = found[name], wanted[name]
    if isinstance(ours, np.ndarray):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
        return same or (not exact and np.allclose(ours, theirs, rtol=0, atol=1e-3))
    if exact or not name.endswith(("metrics.jsonl", "meta/metadata", "learning_curve.png", "_sharding", "run.json")):
        return ours == theirs
    if not name.endswith("metrics.jsonl"):
        return True  # They hold the mesh, or what the losses are to the last bit.
    lines = ([[line["step"], line.get("loss"), line.get("validation_loss")] for line in run] for run in (ours, theirs))
    return np.allclose(*(np.array(line, float) for line in lines), rtol=2e-3, equal_nan=True)


def _contents(run: Path) -> Iterator[tuple[str, Any]]:
    """Yield what is in a run's directory by its name, without times and what libraries name at random."""
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        name = file.relative_to(run).as_posix()
        if name.startswith("tensorboard/") or re.search(r"/(d|ocdbt\.process_\d+)/|/manifest\.ocdbt$", name):
            continue
        if name == "run.json":
            yield (
                name,
                {key: value for key, value in json.loads(file.read_text(encoding="utf-8")).items() if key != "starts"},
            )
        elif name == "metrics.jsonl":
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            yield name, [{key: value for key, value in line.items() if key not in _TIMES} for line in lines]
        elif file.name == "_CHECKPOINT_METADATA":
            values = json.loads(file.read_text(encoding="utf-8"))
            yield name, {key: value for key, value in values.items() if not key.endswith("_timestamp_nsecs")}
        elif file.name == MANIFEST:
            yield from _checkpoint(file.parent, name)
        else:
            yield name, hashlib.sha256(file.read_bytes()).hexdigest()
    for directory in sorted(path for path in run.rglob("*") if path.is_dir() and not any(path.iterdir())):
        yield directory.relative_to(run).as_posix(), "an empty directory"


def _checkpoint(step: Path, manifest: str) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of a checkpoint, and whether its manifest agrees with its files."""
    require_undamaged(epath.Path(step), ("model", "training", "data", "meta"))
    noted = json.loads((step / MANIFEST).read_text(encoding="utf-8"))
    yield manifest, sorted(name for name in noted if not re.search(r"/d/", name))
    for item in ("model", "training"):
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(step / item)
        for path, leaf in jax.tree.leaves_with_path(restored):
            yield f"{step.parent.name}/{step.name}/{item}{jax.tree_util.keystr(path)}", np.asarray(leaf)


def _some(names: Sequence[str]) -> str:
    """Return the first of many names."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class Campaign:
    """Runs of one experiment, each killed some times, and what is noted of them."""

    def __init__(self, directory: Path, devices: Sequence[int], seed: int, steps: int = 14):
        """Go on in `directory`, or begin with the run that is not killed."""
        self._experiment, self._devices, self._seed = Experiment(directory, steps), devices, seed
        self._whole, self._notes = directory / "whole", directory / "results.jsonl"
        if not (directory / "whole.json").exists():
            shutil.rmtree(self._whole, ignore_errors=True)
            shutil.rmtree(self._experiment.run, ignore_errors=True)
            ended = start(self._experiment, devices[0], None)
            self._experiment.run.rename(self._whole)
            (directory / "whole.json").write_text(json.dumps(dataclasses.asdict(ended)), encoding="utf-8")
        self._ended = Started(**json.loads((directory / "whole.json").read_text(encoding="utf-8")))

    @property
    def runs(self) -> list[dict[str, Any]]:
        """What was found of each run: its kills, and what differs."""
        if not self._notes.exists():
            return []
        return [json.loads(line) for line in self._notes.read_text(encoding="utf-8").splitlines()]

    def kill_until(self, kills: int) -> None:
        """Kill and compare runs until there were so many kills in all."""
        while (done := sum(len(run["kills"]) for run in self.runs)) < kills:
            number = len(self.runs)
            shutil.rmtree(self._experiment.run, ignore_errors=True)
            killed = list(self._killed(random.Random(f"{self._seed} {number}"), min(KILLS_OF_A_RUN, kills - done)))
            different = self._differences()
            with self._notes.open("a", encoding="utf-8") as notes:
                notes.write(json.dumps({"kills": killed, "differences": different}) + "\n")
            for what in killed:
                print(f"killed at: {what}")
            print(f"run {number + 1}, {len(killed)} kills: {_some(different) or 'nothing differs'}", flush=True)

    def _killed(self, chance: random.Random, kills: int) -> Iterator[str]:
        """Kill a run so often, unless it ends before; then let it end. Yields what was going on at each kill."""
        for number in range(kills):
            moment = Moment.draw(chance, self._ended.changes, self._ended.lines)
            started = start(self._experiment, self._devices[number % len(self._devices)], moment)
            if started.what is None:
                return
            yield started.what
        start(self._experiment, self._devices[kills % len(self._devices)], None)

    def _differences(self) -> list[str]:
        """Return what differs, found in a process of its own: this one must not use JAX, since it forks."""
        file = self._experiment.directory / "differences.json"

        def action() -> int:
            jax.config.update("jax_platforms", "cpu")
            warnings.filterwarnings("ignore", message="Sharding info")
            found = differences(self._experiment.run, self._whole, exact=len(set(self._devices)) == 1)
            file.write_text(json.dumps(found), encoding="utf-8")
            return 0

        _, status = os.waitpid(fork(action, 1), 0)
        if status:
            raise RuntimeError("the runs could not be compared")
        return json.loads(file.read_text(encoding="utf-8"))


def main() -> int:
    """Kill runs and compare them; print each kill, what differs, and a line for the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--devices", type=int, nargs="+", default=[1], help="of each start in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--directory", help="where runs and results are kept, to go on with them later")
    known = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # The checkpoint library warns of its own doings.
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(known.directory or temporary).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        campaign = Campaign(directory, known.devices, known.seed)
        campaign.kill_until(known.kills)
        runs = campaign.runs
    different = sum(len(run["differences"]) for run in runs)
    same = "the same, bit for bit" if len(set(known.devices)) == 1 else "the same to rounding, the data exactly"
    print(
        f"{sum(len(run['kills']) for run in runs)} kills with SIGKILL in {len(runs)} runs, devices {known.devices}: "
        f"{different} files or arrays differ from the undisturbed run's, all else is {same} "
        f"({time.perf_counter() - begin:.0f} s, jax {jax.__version__})"
    )
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
