"""Checkpoints that are damaged, fail, are of another run, or are removed."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest

from lin_jax.data.sources import TextSource
from lin_jax.experiment import CheckpointConfig, ConfigError
from lin_jax.train import checkpoint
from lin_jax.train.loop import train
from lin_jax.train.saved_model import load_model
from lin_jax.train.validation import Evaluator

from .small_run import call_at, change, curve, final_state, snapshot, steps_of

pytestmark = pytest.mark.usefixtures("stub_model")


ARRAYS = ("model", "training")


def flip(file):
    """One bit in every 64 bytes: not all of a file of arrays is read."""
    data = bytearray(file.read_bytes())
    for index in range(0, len(data), 64):
        data[index] ^= 16
    file.write_bytes(data)


DAMAGES = {
    "flipped bits": flip,
    "a cut file": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "no file": lambda file: file.unlink(),
}


@pytest.fixture(scope="module")
def stopped_workdir(uninterrupted, tmp_path_factory):
    config = dataclasses.replace(uninterrupted, workdir=str(tmp_path_factory.mktemp("stopped") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        call_at(patch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(config)
    return config.workdir


@pytest.fixture
def stopped(config, stopped_workdir):
    """A run that was stopped at step 12, and has a checkpoint of step 10 too."""
    shutil.copytree(stopped_workdir, config.workdir)
    return config


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("item", ["model", "training", "meta", "data"])
def test_damage_falls_back_to_the_checkpoint_before(stopped, uninterrupted, damage, item):
    files = list(
        Path(stopped.workdir, "checkpoints/12", item).glob("ocdbt.process_0/d/*" if item in ARRAYS else "metadata")
    )
    assert files
    for file in files:
        DAMAGES[damage](file)
    messages = []
    train(stopped, messages.append)
    assert "checkpoint 12" in messages[0] and "cannot be read" in messages[0] and "\n" not in messages[0]
    assert "resumed from the checkpoint of step 10" in messages[1]
    assert Path(stopped.workdir, "unreadable_checkpoints/12").is_dir()
    assert final_state(stopped) == final_state(uninterrupted) and curve(stopped) == curve(uninterrupted)


@pytest.mark.parametrize("name", ["_METADATA", "_sharding", "manifest.ocdbt", "array_metadatas/process_0", "d/*"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_librarys_files_are_not_read_when_they_are_damaged(
    stopped, uninterrupted, monkeypatch, capfd, name, damage
):
    for file in Path(stopped.workdir, "checkpoints/12/training").glob(name):
        DAMAGES[damage](file)
    restored, messages = [], []
    original = ocp.CheckpointManager.restore
    monkeypatch.setattr(
        ocp.CheckpointManager,
        "restore",
        lambda self, step, *arguments, **options: restored.append(step) or original(self, step, *arguments, **options),
    )
    train(stopped, messages.append)
    assert set(restored) == {10} and "Traceback" not in capfd.readouterr().err
    assert "checkpoint 12" in messages[0] and "resumed from the checkpoint of step 10" in messages[1]
    assert final_state(stopped) == final_state(uninterrupted) and curve(stopped) == curve(uninterrupted)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_beside_the_items_does_not_change_the_result(stopped, uninterrupted, capfd, name, damage):
    DAMAGES[damage](Path(stopped.workdir, "checkpoints/12", name))
    train(stopped, lambda line: None)
    assert "Traceback" not in capfd.readouterr().err
    assert final_state(stopped) == final_state(uninterrupted) and curve(stopped) == curve(uninterrupted)


def replace(path, *, by_directory):
    """Put something of the other sort in the place of a file or directory."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.mkdir() if by_directory else path.write_text("x")


@pytest.mark.parametrize(
    ("name", "by_directory"),
    [
        ("metrics.jsonl", True),
        ("tensorboard", False),
        ("run.json", True),
        ("tokenizer", False),
        ("tokenizer/tokenizer_info.json", True),
        ("unreadable_checkpoints", False),
    ],
)
def test_what_is_of_the_other_sort_is_named_in_a_line(stopped, name, by_directory):
    replace(Path(stopped.workdir, name), by_directory=by_directory)
    if name == "unreadable_checkpoints":
        Path(stopped.workdir, "checkpoints/12/data/metadata").unlink()
    with pytest.raises(ConfigError, match=name) as error:
        train(stopped, lambda line: None)
    assert "\n" not in str(error.value)
    assert steps_of(stopped)[-1] == 12, "nothing was lost"


def test_another_tokenizer_is_refused_and_the_same_one_left_as_it_is(config, monkeypatch):
    config = change(config, "data.tokenizer=train", "data.tokenizer_vocabulary=257", "train.steps=6")
    train(config)
    files = {file: file.read_bytes() for file in Path(config.workdir, "tokenizer").iterdir()}
    before = snapshot(Path(config.workdir, "tokenizer"))
    train(change(config, "train.steps=7"))
    assert snapshot(Path(config.workdir, "tokenizer")) == before
    file = Path(config.workdir, "tokenizer/tokenizer.json")
    file.write_bytes(files[file].replace(b'"a"', b'"%"', 1))
    with pytest.raises(ConfigError, match="the tokenizer in .* is not the one that the checkpoints were made with"):
        train(change(config, "train.steps=8"))
    file.write_bytes(files[file])
    assert train(change(config, "train.steps=8")).step == 8


def test_changed_metrics_are_told_of(stopped, uninterrupted):
    file = Path(stopped.workdir, "metrics.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3] + lines[4:]))
    messages = []
    train(stopped, messages.append)
    assert "metrics.jsonl is not as it was at step 12" in messages[0]
    assert final_state(stopped)[1] == final_state(uninterrupted)[1]


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ({}, {5, 6}),
        ({1: 2.0, 2: 1.0, 3: 3.0}, {2, 5, 6}),
        ({1: None, 2: None, 6: 1.0}, {5, 6}),
        ({1: 1.0, 2: 1.0, 9: 0.5}, {2, 5, 6}),
    ],
)
def test_which_checkpoints_are_kept(losses, kept):
    steps = [1, 2, 3, 4, 5, 6]
    assert checkpoint.kept_steps(steps, losses, CheckpointConfig(keep=2)) == kept
    assert checkpoint.kept_steps(steps, losses, CheckpointConfig(keep=2, keep_best=False)) == {5, 6}
    assert checkpoint.kept_steps([4], losses, CheckpointConfig(keep=2)) == {4}


def test_a_resumed_run_keeps_the_checkpoints_of_one_that_was_not_interrupted(config, tmp_path):
    """The best one of an earlier start, and none that a kill left half removed."""
    config = change(config, "train.evaluate_every=2", "checkpoint.every=2", "checkpoint.keep=1", "train.steps=12")
    whole = dataclasses.replace(config, workdir=str(tmp_path / "whole"))
    train(whole)
    train(change(config, "train.steps=8"))
    left = Path(config.workdir, "checkpoints/2")
    shutil.copytree(Path(config.workdir, "checkpoints/8"), left)
    for file in ("meta/metadata", "manifest.json"):
        (left / file).unlink()
    train(config)
    assert steps_of(config) == steps_of(whole)


def test_nothing_readable_is_an_error_and_not_a_new_start(config):
    train(change(config, "train.steps=6"))
    for file in Path(config.workdir, "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    before = snapshot(config.workdir)
    with pytest.raises(ConfigError, match="can be read"):
        train(change(config, "train.steps=6"), lambda line: None)
    with pytest.raises(ConfigError, match="can be read"):
        load_model(config.workdir)
    assert snapshot(config.workdir) == before


def test_a_position_in_other_text_is_refused(uninterrupted, monkeypatch):
    before = snapshot(uninterrupted.workdir)
    monkeypatch.setattr(TextSource, "fingerprint", "of other text")
    with pytest.raises(ConfigError, match="the training text has changed since the run in .* put it back"):
        train(uninterrupted)
    assert snapshot(uninterrupted.workdir) == before


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("model.width=32", "config.model.width is 32, but .* were made with 16"),
        ("optimizer.beta2=0.95", "config.optimizer.beta2 is 0.95"),
        ("data.seed=3", "config.data.seed is 3"),
        ("data.tokenizer=train", "config.data.tokenizer is train"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(config, override, name):
    config = change(config, "train.steps=6")
    train(config)
    before = snapshot(config.workdir)
    with pytest.raises(ConfigError, match=name):
        train(change(config, override))
    assert snapshot(config.workdir) == before


def test_last_and_best_checkpoints_are_kept(config, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    values = ({"validation_loss": loss, "perplexity": 1.0, "bits_per_byte": 1.0} for loss in losses)
    monkeypatch.setattr(Evaluator, "measure", lambda self, state: next(values))
    train(change(config, "train.evaluate_every=4", "checkpoint.every=4"))
    assert steps_of(config) == [8, 20, 24]


def test_a_full_disk_does_not_stop_training(config, uninterrupted, monkeypatch):
    original = ocp.CheckpointManager.save

    def save(self, step, *arguments, **options):
        if step == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, step, *arguments, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    messages = []
    train(config, messages.append)
    warning = next(message for message in messages if "could not be saved" in message)
    assert "checkpoint 10" in warning and "No space left" in warning and "newest checkpoint" in warning
    assert final_state(config) == final_state(uninterrupted) and curve(config) == curve(uninterrupted)


@pytest.fixture
def small_disk(tmp_path):
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(directory)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not allowed here")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_disk_that_really_is_full(config, uninterrupted, small_disk, monkeypatch):
    """The disk is full from the checkpoint of step 10 to that of step 15."""
    config = dataclasses.replace(config, workdir=str(small_disk / "run"))
    ballast, messages = small_disk / "ballast", []
    start = checkpoint.Checkpoints._start

    def start_on_full_disk(self, step, *arguments):
        if step == 10:
            fill(ballast)
        if step == 15:
            assert steps_of(config) == [5] and len(list(Path(config.workdir, "checkpoints").iterdir())) == 1
            ballast.unlink()
        start(self, step, *arguments)

    monkeypatch.setattr(checkpoint.Checkpoints, "_start", start_on_full_disk)
    train(config, messages.append)
    assert any("checkpoint 10 could not be saved" in message for message in messages)
    assert final_state(config) == final_state(uninterrupted) and curve(config) == curve(uninterrupted)


def fill(file):
    with open(file, "wb", buffering=0) as opened:
        for size in (1 << 16, 1):
            try:
                while opened.write(b"x" * size):
                    pass
            except OSError:
                continue


def test_a_last_checkpoint_that_fails_is_an_error(config, monkeypatch):
    def save(self, step, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    with pytest.raises(ConfigError, match="checkpoint of step 3 could not be saved"):
        train(change(config, "train.steps=3", "optimizer.warmup_steps=0"), lambda line: None)


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ConfigError, "checkpoint 5 could not be saved .*: see to"),
        (RuntimeError("Gloo all-reduce failed: Connection closed by peer"), RuntimeError, "Connection closed"),
    ],
)
def test_of_several_processes_none_goes_on_without_a_checkpoint(config, monkeypatch, error, raised, said):
    def save(self, step, *arguments, **options):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    with pytest.raises(raised, match=said):
        train(config, lambda line: None)
