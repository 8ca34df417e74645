"""A run of a very small model: what it came to, and how it is interrupted."""

import json
from pathlib import Path

import jax
from flax import nnx

from lin_jax.settings.command_line import apply_overrides
from lin_jax.train import loop
from lin_jax.train.metrics import read_metrics
from lin_jax.train.saved_model import load_model

STEPS = 24


def change(config, *overrides):
    return apply_overrides(config, [f"--config.{override}" for override in overrides])


def steps_of(config):
    return sorted(int(path.name) for path in Path(config.workdir, "checkpoints").iterdir() if path.name.isdigit())


def final_state(config):
    """Checksums of all arrays, parameters, optimizer, step, and the position in the data."""
    directory = Path(config.workdir, "checkpoints", str(config.train.steps))
    return json.loads((directory / "meta/metadata").read_text())["checksums"], (directory / "data/metadata").read_text()


def curve(config):
    """What the metrics say apart from the time it took."""
    names = ("step", "loss", "gradient_norm", "learning_rate", "tokens", "skipped", "validation_loss", "bits_per_byte")
    lines = read_metrics(Path(config.workdir, "metrics.jsonl"))
    return [{name: line[name] for name in names if name in line} for line in lines]


def parameters_of(config):
    return jax.device_get(nnx.to_pure_dict(nnx.state(load_model(config.workdir)[0], nnx.Param)))


def snapshot(directory):
    files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files]


def call_at(monkeypatch, step, action):
    """Call `action` when `step` has been handed to the device."""
    original = loop.MetricsLog.add

    def add(self, at, metrics):
        if at == step:
            action()
        original(self, at, metrics)

    monkeypatch.setattr(loop.MetricsLog, "add", add)


class Killed(BaseException):
    """Stands for the end of the process: nothing may handle it."""


def kill():
    raise Killed
