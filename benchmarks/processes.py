"""Several processes on one machine do what one does: python -m benchmarks.processes

Trains a very small model with `train.py`, in one process and in several, on CPU devices, and compares losses, gradient
norms and the position in the data. Then a checkpoint of 4 processes goes on in 2 and in 1; one of several is killed by
SIGKILL, which must stop the others, and the run is started again; one is told by SIGTERM to stop. Prints a table, and
ends with exit code 1 if anything does not agree. Twelve starts; about ten minutes on two cores.
"""

import argparse
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.resume import ROOT, Experiment

STEPS = 40
DEVICES = 4  # in all, whatever the number of processes
LOSS_TOLERANCE = 1e-5
# In which a start must have ended.
START_SECONDS = 900
# In which the others must have stopped.
PATIENCE_SECONDS = 60
MESHES = {
    "data 4": ("data=4",),
    "fsdp 4": ("data=1", "fsdp=4"),
    "data 2 x fsdp 2": ("data=2", "fsdp=2"),
    # All processes need all rows, or parts of them.
    "tensor 4": ("data=1", "tensor=4"),
    "fsdp 2 x sequence 2": ("data=1", "fsdp=2", "sequence=2"),
}


@dataclasses.dataclass(frozen=True)
class Process:
    """One of several, with the file of what it prints."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(encoding="utf-8")


class Cluster:
    """Starts runs of one experiment in any number of processes."""

    def __init__(self, directory: Path):
        """Write the experiment's text and settings."""
        Experiment(directory, STEPS)
        self.directory, self._starts = directory, 0

    def start(self, name: str, count: int, *settings: str) -> list[Process]:
        """`count` processes that go on with the run `name`."""
        self._starts += 1
        address = f"localhost:{free_port()}"
        common = [
            f"workdir={self.directory / name}",
            "optimizer.schedule=constant",
            "train.evaluate_every=0",
            *settings,
        ]
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self.directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}",
        }
        found = []
        for index in range(count):
            place = [f"coordinator={address}", f"processes={count}", f"process={index}"] if count > 1 else []
            arguments = [*common, *(f"distributed.{part}" for part in place)]
            command = [sys.executable, "train.py", "--config", str(self.directory / "config.py")]
            output = self.directory / f"{name}_{self._starts}_{index}.txt"
            with output.open("wb") as file:
                process = subprocess.Popen(
                    [*command, *(f"--config.{argument}" for argument in arguments)],
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            found.append(Process(process, output))
        return found

    def finish(self, name: str, count: int, *settings: str) -> "Ending":
        """Let the run `name` go on to its end."""
        processes = self.start(name, count, *settings)
        codes = [one.process.wait(START_SECONDS) for one in processes]
        if any(codes):
            raise RuntimeError("\n".join(f"{one.process.args}: {one.text}" for one in processes))
        silent = not any(re.search(r"^(step|finished) \d", one.text, re.MULTILINE) for one in processes[1:])
        require(silent, "only process 0 prints")
        return self.ending(name)

    def ending(self, name: str) -> "Ending":
        """What a run came to."""
        lines = [
            json.loads(line)
            for line in (self.directory / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        newest = max((self.directory / name / "checkpoints").iterdir(), key=lambda path: int(path.name))
        steps = {line["step"]: line for line in lines if line.get("loss") is not None}
        require(list(steps) == list(range(1, len(steps) + 1)), f"{name}: steps are missing or doubled")
        return Ending(steps, (newest / "data" / "metadata").read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Ending:
    """What a run came to: its lines of metrics by step, and the position in the data after the last."""

    steps: dict[int, dict[str, float]]
    position: str

    def against(self, other: "Ending") -> str:
        """How well two runs agree; raises `AssertionError` where they don't."""
        require(self.position == other.position, "the position in the data differs")
        require(self.steps.keys() == other.steps.keys(), "they have other steps")
        difference = {}
        for name in ("loss", "gradient_norm", "tokens"):
            ours, theirs = (np.array([line[name] for line in run.steps.values()]) for run in (self, other))
            difference[name] = float(np.max(np.abs(ours / theirs - 1)))
        require(difference["tokens"] == 0, "the tokens differ")
        told = f"loss {difference['loss']:.1e}, gradient norm {difference['gradient_norm']:.1e}, data identical"
        require(difference["loss"] <= LOSS_TOLERANCE, f"the losses differ: {told}")
        return told


def require(condition: bool, problem: str) -> None:
    """Raise `AssertionError(problem)` unless `condition` holds."""
    if not condition:
        raise AssertionError(problem)


def free_port() -> int:
    """A port of this machine that nothing listens to."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def wait_for(process: Process, text: str) -> None:
    """Until it has printed `text`."""
    while text not in process.text:
        require(process.process.poll() is None, f"it ended without {text!r}: {process.text}")
        time.sleep(0.02)


def kill_one(cluster: Cluster, name: str, count: int, victim: int, moment: str) -> str:
    """Kill a process with SIGKILL after process 0 printed `moment`; how the others ended."""
    processes = cluster.start(name, count, f"train.steps={50 * STEPS}", "checkpoint.every=5", *mesh("fsdp 4"))
    wait_for(processes[0], moment)
    processes[victim].process.kill()
    begin, seconds = time.perf_counter(), []
    for one in (one for index, one in enumerate(processes) if index != victim):
        code = one.process.wait(PATIENCE_SECONDS - (time.perf_counter() - begin))
        seconds.append(time.perf_counter() - begin)
        require(code != 0, f"a process ended with {code} after another one was killed")
        require("start the same command again" in wait_for_words(one), f"a process did not say why: {one.text}")
    return f"{count - 1} others stopped, with a message each, after {min(seconds):.0f} to {max(seconds):.0f} s"


def wait_for_words(process: Process) -> str:
    """What a process printed, with its last words, which may come after its end."""
    for _ in range(50):
        if "start the same command again" in process.text:
            break
        time.sleep(0.1)
    return process.text


def stop_one(cluster: Cluster, name: str, count: int) -> str:
    """Send SIGTERM to the last process; all must save at the same step and end without error."""
    processes = cluster.start(name, count, f"train.steps={50 * STEPS}", "checkpoint.every=0")
    wait_for(processes[0], "step 4/")
    processes[-1].process.send_signal(signal.SIGTERM)
    codes = [one.process.wait(PATIENCE_SECONDS) for one in processes]
    require(not any(codes), f"exit codes {codes}: {processes[-1].text}")
    return f"all ended without error; {processes[0].text.splitlines()[-1]}"


class Table:
    """Rows that are printed as they come out, the failed ones too."""

    def __init__(self) -> None:
        """Print the head."""
        self.failed = False
        print("| what | largest relative differences, or what happened | took |\n|---|---|---|")

    def row(self, name: str, make: Callable[..., str], *arguments: Any) -> None:
        """One row with what `make(*arguments)` says."""
        begin = time.perf_counter()
        try:
            result = make(*arguments)
        except (AssertionError, RuntimeError, subprocess.TimeoutExpired) as error:
            self.failed, result = True, f"FAILED: {error}"
        print(f"| {name} | {result} | {time.perf_counter() - begin:.0f} s |", flush=True)


def agree(cluster: Cluster, table: Table) -> None:
    """Several processes against one."""
    one = cluster.finish("one", 1, *mesh("data 4"))
    for name, count in (("data 4", 2), *((name, 4) for name in MESHES)):
        run = f"{count}_{name.replace(' ', '_')}"
        table.row(f"{count} processes, mesh {name}", finish, cluster, run, count, name, one)


def resume(cluster: Cluster, table: Table) -> None:
    """A run that goes on in another number of processes, against one that stays in one."""
    one = cluster.finish("only", 1, *mesh("data 4"))
    for counts in ((4, 2, 1), (4, 1)):
        table.row(f"{', then '.join(map(str, counts))} processes", in_turn, cluster, counts, one)


def kill(cluster: Cluster, table: Table) -> None:
    """Processes that are killed, and the run that is started again against one that was not."""
    whole = cluster.finish("whole", 4, *mesh("fsdp 4"))
    for victim, moment in ((3, "step 10/"), (0, "step 10/"), (1, "compiled in")):
        run, after = f"killed_{victim}", moment.rstrip("/")
        table.row(f"SIGKILL to process {victim} of 4 after {after!r}", kill_one, cluster, run, 4, victim, moment)
        table.row("- started again", finish, cluster, run, 4, "fsdp 4", whole)


def stop(cluster: Cluster, table: Table) -> None:
    """A process that is told to stop."""
    table.row("SIGTERM to one of 2", stop_one, cluster, "stopped", 2)


PARTS = {"agree": agree, "resume": resume, "kill": kill, "stop": stop}


def main() -> int:
    """Run all of it, or the named parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    names = parser.parse_args().parts or PARTS
    print(f"jax {jax.__version__}, {DEVICES} CPU devices in all, {os.cpu_count()} cores")
    table = Table()
    with tempfile.TemporaryDirectory() as scratch:
        cluster = Cluster(Path(scratch))
        for name in names:
            PARTS[name](cluster, table)
    return int(table.failed)


def finish(cluster: Cluster, run: str, count: int, name: str, other: Ending) -> str:
    """Let a run on the mesh `name` go on to its end; how it agrees with another one."""
    return cluster.finish(run, count, *mesh(name)).against(other)


def mesh(name: str) -> list[str]:
    """The settings of a mesh."""
    return [f"mesh.{part}" for part in MESHES[name]]


def in_turn(cluster: Cluster, counts: Sequence[int], other: Ending) -> str:
    """How a run that goes on with other numbers of processes, and with other meshes, agrees with another one."""
    name = "_".join(map(str, counts))
    for number, count in enumerate(counts):
        steps = STEPS * (number + 1) // len(counts)
        ending = cluster.finish(name, count, f"train.steps={steps}", *mesh("fsdp 4" if number % 2 == 0 else "data 4"))
    return ending.against(other)


if __name__ == "__main__":
    sys.exit(main())
