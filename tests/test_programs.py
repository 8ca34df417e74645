"""The programs as a user starts them: a run, its evaluation, and wrong input, which takes one line and exit code 2."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eval as eval_program
import train as train_program
from lin_jax.train.saved_model import load_model

ROOT = Path(__file__).parent.parent
CONFIG = """
from lin_jax.experiment import *

def get_config(workdir):
    return Config(
        workdir=workdir,
        model=FlashConfig(
            vocabulary_size=257, width=16, depth=2, query_key_size=8, rotary_size=4,
            attention=AugmentedConfig(group_size=8, convolution=4),
        ),
        data=DataConfig(
            source="text", path=(CORPUS,), cache_directory=workdir + "-cache", sequence_length=32, batch_size=8
        ),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2),
        train=TrainConfig(steps=12, evaluate_every=6, evaluate_batches=2, log_every=4),
        checkpoint=CheckpointConfig(every=6),
    )
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    directory = tmp_path_factory.mktemp("experiment")
    corpus = directory / "corpus.jsonl"
    texts = ("abc " * (index % 9 + 1) + str(index) * 3 for index in range(150))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (directory / "config.py").write_text(CONFIG.replace("CORPUS", repr(str(corpus))))
    return directory


@pytest.fixture(scope="module")
def run(experiment):
    """A run of train.py in a process of its own."""
    workdir = experiment / "run"
    command = [sys.executable, "train.py", "--config", f"{experiment}/config.py:{workdir}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return workdir, finished


def files_of(directory):
    return sorted(str(path) for path in Path(directory).rglob("*"))


def test_train_says_what_it_does(run):
    workdir, finished = run
    lines = finished.stdout.splitlines()
    assert "parameters on 1 x cpu" in lines[0] and lines[1].startswith("step 4/12: loss ")
    assert lines[-1].startswith(f"finished 12 steps in {workdir}: validation loss ")
    assert "bits-per-byte" in lines[-1] and "perplexity" in lines[-1] and not finished.stderr
    kept = {path.name for path in workdir.iterdir()}
    assert kept == {"checkpoints", "learning_curve.png", "metrics.jsonl", "run.json", "tensorboard", "tokenizer"}


def naive_loss(workdir, texts, window):
    model, tokenizer, _ = load_model(str(workdir))
    total = count = 0
    for text in texts:
        targets = np.append(tokenizer.encode(text), tokenizer.end_id)
        tokens = np.append(tokenizer.start_id, targets[:-1]).astype(np.int32)
        for start in range(0, len(targets), window):
            logits = model(jnp.asarray(tokens[None, start : start + window]))[0]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets[start : start + window])
            total, count = total + float(losses.sum()), count + len(losses)
    return total / count, count


def test_eval_of_other_files(run, experiment, capsys):
    workdir, _ = run
    texts = ["abc abc 77", "something else altogether, which is longer than the window of it", "é"]
    paths = [experiment / f"other{index}.txt" for index in range(3)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    output = experiment / "result.json"
    paths = [str(path) for path in paths]
    arguments = ["--checkpoint", str(workdir), "--window", "24", "--stride", "24", "--output", str(output)]
    assert eval_program.main([*arguments, "--path", *paths]) == 0
    found = json.loads(output.read_text())
    loss, count = naive_loss(workdir, texts, 24)
    assert found["documents"] == 3 and found["tokens"] == count and found["bytes"] == len("".join(texts).encode())
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(found["bits_per_byte"], loss * count / math.log(2) / found["bytes"], rtol=1e-5)
    printed = capsys.readouterr().out
    assert f"perplexity {found['perplexity']:.3f}" in printed and str(output) in printed


def test_eval_of_the_validation_text(run, capsys):
    workdir, _ = run
    assert eval_program.main(["--checkpoint", str(workdir)]) == 0
    found = json.loads((workdir / "evaluation.json").read_text())
    assert found["window"] == 32 and found["stride"] == 16 and found["documents"] == 8
    assert "bits-per-byte" in capsys.readouterr().out


TRAIN_ERRORS = {
    "config.train.stepz": ["--config.train.stepz=3"],
    "did you mean steps": ["--config.train.stepz=3"],
    "must be a whole number": ["--config.train.steps=many"],
    "group_size must be greater than 0": ["--config.model.attention.group_size=0"],
    "absent.txt": ["--config.data.path=absent.txt"],
    "empty": ["--config.data.path={}/empty.txt"],
    "UTF-8": ["--config.data.path={}/latin.txt"],
    "vocabulary_size": ["--config.model.vocabulary_size=200"],
    "mesh.data=3": ["--config.mesh.data=3"],
    "unexpected argument": ["--steps=3"],
}


@pytest.mark.parametrize("message", TRAIN_ERRORS)
def test_wrong_input_of_train(experiment, tmp_path, capsys, message):
    (experiment / "empty.txt").write_text("")
    (experiment / "latin.txt").write_bytes("é".encode("latin-1") * 100)
    overrides = [override.format(experiment) for override in TRAIN_ERRORS[message]]
    assert train_program.main(["--config", f"{experiment}/config.py:{tmp_path}/run", *overrides]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert not printed.out and not Path(tmp_path, "run").exists()


def test_a_run_of_another_model_is_left_alone(run, experiment, capsys):
    workdir, _ = run
    before = files_of(workdir)
    assert train_program.main(["--config", f"{experiment}/config.py:{workdir}", "--config.model.depth=3"]) == 2
    assert "config.model.depth is 3, but" in capsys.readouterr().err and files_of(workdir) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{}/absent"], "no checkpoint"),
        (["--checkpoint", "{}/run", "--stride", "99"], "stride"),
        (["--checkpoint", "{}/run", "--path", "absent.txt"], "absent.txt"),
        (["--checkpoint", "{}/run", "--config.data.sauce=x"], "did you mean source"),
        (["--checkpoint", "{}/run", "--widnow=8"], "unexpected argument"),
    ],
)
def test_wrong_input_of_eval(run, experiment, capsys, arguments, message):
    before = files_of(experiment)
    assert eval_program.main([argument.format(experiment) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert files_of(experiment) == before


def test_sharding_is_shown_without_training(experiment, tmp_path, capsys):
    arguments = ["--config", f"{experiment}/config.py:{tmp_path}/run", "--config.show_sharding", "--config.mesh.fsdp=8"]
    assert train_program.main(arguments) == 0
    assert "embedding" in capsys.readouterr().out and not Path(tmp_path, "run").exists()


def test_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        train_program.main(["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "--config.optimizer.peak_learning_rate=0.0007  (a number)" in printed
