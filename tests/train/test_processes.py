"""Several processes: the same batches and losses as one, stopping and dying together, resumed by another number."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lin_jax.experiment import load_config
from lin_jax.settings.command_line import apply_overrides
from lin_jax.train import loop, trainable
from lin_jax.train.metrics import read_metrics

from .stub import Stub

ROOT = Path(__file__).parent.parent.parent
STEPS = 8
CONFIG = """
from lin_jax.experiment import *

def get_config(workdir):
    return Config(
        workdir=workdir,
        model=FlashConfig(vocabulary_size=257, width=16),
        data=DataConfig(
            source="text", path=(CORPUS,), cache_directory=workdir + "-cache", sequence_length=32, batch_size=8
        ),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, schedule="constant"),
        train=TrainConfig(steps=8, evaluate_every=4, evaluate_batches=2, log_every=2),
        checkpoint=CheckpointConfig(every=3),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
"""
# Two devices each. The second process alone is told to stop, after step 3; both do when they next agree, at step 4.
# They go on, begin to save at step 6, and the second is killed in step 7.
PROCESS = """
import os, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
from lin_jax.experiment import DistributedConfig
from lin_jax.experiment import load_config
from lin_jax.train import distributed, loop, trainable
from tests.train.stub import Stub

index, address, config = int(sys.argv[1]), *sys.argv[2:]
trainable.create_model = lambda config, rngs: Stub(rngs, config.vocabulary_size, config.width)

def add(self, step, metrics, original=loop.MetricsLog.add):
    original(self, step, metrics)
    if index == 1 and step in (3, 7):
        os.kill(os.getpid(), signal.SIGTERM if step == 3 else signal.SIGKILL)

loop.MetricsLog.add = add
distributed.HEARTBEAT_SECONDS = 10
with distributed.joined(DistributedConfig(coordinator=address, processes=2, process=index)):
    for stops in (True, False):
        result = loop.train(load_config(config), report=lambda line: print(line, flush=True))
        assert stops and result.interrupted and result.step == 4, result
"""


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture
def config_file(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    texts = ("abc " * (index % 9 + 1) + str(index) * 3 for index in range(150))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "config.py").write_text(CONFIG.replace("CORPUS", repr(str(corpus))))
    return str(tmp_path / "config.py")


def test_two_processes_stop_and_die_together_and_one_goes_on(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(
        trainable, "create_model", lambda config, rngs: Stub(rngs, config.vocabulary_size, config.width)
    )
    address, workdir = f"localhost:{free_port()}", tmp_path / "several"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), address, f"{config_file}:{workdir}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    told = "\n".join(outputs)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), told
    assert "process 0 of 2" in outputs[0] and "start the same command again on every host" in outputs[0], told
    assert "resumed from the checkpoint of step 4" in outputs[0], told
    assert not [line for line in outputs[1].splitlines() if line.startswith(("resumed", "step "))], told
    several = load_config(f"{config_file}:{workdir}")
    one = dataclasses.replace(several, workdir=str(tmp_path / "one"))
    one = apply_overrides(one, [f"--config.mesh.data={jax.device_count()}", "--config.mesh.fsdp=1"])
    results = [loop.train(several), loop.train(one)]
    lines = [
        [line for line in read_metrics(Path(config.workdir, "metrics.jsonl")) if "loss" in line]
        for config in (several, one)
    ]
    assert [[line["step"] for line in run] for run in lines] == [list(range(1, STEPS + 1))] * 2
    for name, tolerance in (("tokens", 0), ("loss", 1e-5), ("gradient_norm", 1e-3)):
        values = [[line[name] for line in run] for run in lines]
        np.testing.assert_allclose(values[0], values[1], rtol=tolerance)
    np.testing.assert_allclose(*(result.validation["validation_loss"] for result in results), rtol=1e-4)
