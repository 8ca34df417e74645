"""A run that is killed again and again ends as the run that is not: python -m benchmarks.resume --kills 20

Trains a very small model twice, in processes of their own: once undisturbed, and once killed by SIGKILL at random
moments (while starting, compiling, training, evaluating or saving) and started again. With one number of devices
everything must agree bit for bit: parameters, optimizer, position in the data, losses. With `--devices 8 1 4` each
start has another number of virtual CPU devices, fsdp parts included; the data must agree exactly, the rest to rounding.
"""

import argparse
import dataclasses
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lin_jax.train.saved_model import load_model

ROOT = Path(__file__).parent.parent
BATCH = 8
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


@dataclasses.dataclass(frozen=True)
class Ending:
    """What a run comes to."""

    checksums: dict[str, int]  # of every array of model, optimizer and step
    position: str  # in the data
    lines: list[tuple[object, ...]]  # step, loss, gradient norm, tokens, validation loss
    parameters: list[np.ndarray]


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

    def start(self, name: str, devices: int) -> subprocess.Popen[str]:
        """A process that goes on with the run `name`."""
        arguments = [f"--config.workdir={self.directory / name}", f"--config.mesh.fsdp={2 if devices % 2 == 0 else 1}"]
        command = [sys.executable, "train.py", "--config", str(self.directory / "config.py"), *arguments]
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self.directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, encoding="utf-8", **pipes)

    def finish(self, name: str, devices: int) -> Ending:
        """Let the run `name` go on to its end."""
        process = self.start(name, devices)
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"the run failed:\n{output}")
        return self._ending(name)

    def _ending(self, name: str) -> Ending:
        workdir = self.directory / name
        newest = workdir / "checkpoints" / str(self.steps)
        names = ("step", "loss", "gradient_norm", "tokens", "validation_loss")
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        model, _, _ = load_model(str(workdir))
        meta = json.loads((newest / "meta/metadata").read_text(encoding="utf-8"))
        return Ending(
            checksums={**meta["checksums"]["model"], **meta["checksums"]["training"]},
            position=(newest / "data/metadata").read_text(encoding="utf-8"),
            lines=[tuple(line.get(name) for name in names) for line in lines],
            parameters=[np.asarray(leaf) for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))],
        )


def steps_for(kills: int) -> int:
    """Steps that last until the last kill: no start makes more than about 75 before it is killed."""
    return 80 * (kills + 1)


def kill_at_random(experiment: Experiment, name: str, devices: int, chance: random.Random) -> str:
    """Start the run, kill it some time after one of its first lines, and say what it had come to."""
    process = experiment.start(name, devices)
    lines, last = chance.choice([0, 1, 2, 5, 10, 15, 20, 25, 30]), "starting"
    if lines == 0:
        time.sleep(chance.uniform(0.0, 4.0))
    else:
        for _ in range(lines):
            last = (process.stdout.readline() or last).strip()
        time.sleep(chance.uniform(0.0, 0.02))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the run ended before it could be killed: give more steps ({last})")
    return last


def checkpoints(experiment: Experiment, name: str) -> str:
    """The checkpoints of a run, unfinished ones included."""
    directory = experiment.directory / name / "checkpoints"
    return " ".join(sorted(path.name for path in directory.iterdir())) if directory.exists() else "none"


def killed_ending(experiment: Experiment, kills: int, devices: Sequence[int], seed: int) -> Iterator[str | Ending]:
    """What is left after each kill, and at last the ending of the run."""
    chance = random.Random(seed)
    for kill in range(kills):
        count = devices[kill % len(devices)]
        last = kill_at_random(experiment, "killed", count, chance)
        yield f"kill {kill + 1} on {count} devices after {last!r}; left: {checkpoints(experiment, 'killed')}"
    yield experiment.finish("killed", devices[kills % len(devices)])


def compare(killed: Ending, whole: Ending, *, exact: bool) -> str:
    """Raise AssertionError unless the two endings agree; returns how well."""
    assert killed.position == whole.position, "the position in the data differs"
    assert [line[0] for line in killed.lines] == [line[0] for line in whole.lines], "steps are missing or doubled"
    if exact:
        assert killed.lines == whole.lines, "losses differ"
        assert killed.checksums == whole.checksums, "parameters or optimizer differ"
        pairs = zip(killed.parameters, whole.parameters, strict=True)
        assert all(np.array_equal(ours, theirs) for ours, theirs in pairs), "parameters differ"
        return "bit for bit"
    difference = max(float(np.abs(a - b).max()) for a, b in zip(killed.parameters, whole.parameters, strict=True))
    losses = [np.array([[np.nan if v is None else v for v in line] for line in run.lines]) for run in (killed, whole)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-3)
    assert difference < 1e-3, f"parameters differ by {difference}"
    return f"parameters to {difference:.1e}, losses to {np.nanmax(np.abs(losses[0] - losses[1])):.1e}, data exactly"


def main() -> None:
    """Run the comparison and print a line for each kill and one for the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--devices", type=int, nargs="+", default=[1], help="of each start in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    known = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # The checkpoint library warns of its own doings.
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        experiment = Experiment(Path(directory), steps=steps_for(known.kills))
        whole = experiment.finish("whole", known.devices[0])
        for result in killed_ending(experiment, known.kills, known.devices, known.seed):
            print(result if isinstance(result, str) else compare(result, whole, exact=len(set(known.devices)) == 1))
    print(
        f"{known.kills} kills with SIGKILL, {experiment.steps} steps, devices {known.devices}: the killed run ended as "
        f"the undisturbed one ({time.perf_counter() - begin:.0f} s, jax {jax.__version__})"
    )


if __name__ == "__main__":
    main()
