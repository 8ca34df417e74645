"""Generated targets where a run has several processes: each generates all of them, from parameters cut over both."""

import json
import os
import subprocess
import sys

from tests.train.test_processes import ROOT, free_port

CONFIG = """
from lin_jax.experiment import *

def get_config(workdir):
    return Config(
        workdir=workdir,
        model=T5Config(
            vocabulary_size=257, width=16, depth=1, encoder_depth=1, heads=2, head_size=8, feed_forward_size=16
        ),
        data=DataConfig(
            source="table", path=(PAIRS,), target_field="target", sequence_length=16, target_length=6, batch_size=8
        ),
        train=TrainConfig(steps=2),
        finetune=Seq2seqFinetuneConfig(generated_examples=3),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
"""
PROCESS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
from lin_jax.experiment import DistributedConfig, load_config
from lin_jax.train import distributed, loop

index, address, config = int(sys.argv[1]), *sys.argv[2:]
with distributed.joined(DistributedConfig(coordinator=address, processes=2, process=index)):
    result = loop.train(load_config(config), report=lambda line: None)
    print("found", sorted(result.validation.items()))
"""


def test_both_measure_the_same(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"text": "abc"[index % 3] * 4, "target": "abc"[index % 3]} for index in range(30)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.py").write_text(CONFIG.replace("PAIRS", repr(str(pairs))))
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), address, f"{tmp_path / 'config.py'}:{tmp_path / 'run'}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = [[line for line in output.splitlines() if line.startswith("found")] for output, _ in outputs]
    assert found[0] == found[1] and "rougeLsum" in found[0][0], outputs[0][1]
