"""Whole runs of a very small model: resuming, checkpoints that fail or are damaged, files that are left behind."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from lin_jax.data.sources import TextSource
from lin_jax.experiment import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    FlashConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from lin_jax.settings.command_line import apply_overrides
from lin_jax.settings.dictionaries import section_to_dict
from lin_jax.train import checkpoint, checksums, loop, sharding, trainable
from lin_jax.train.loop import train
from lin_jax.train.metrics import read_metrics
from lin_jax.train.saved_model import load_model
from lin_jax.train.validation import Evaluator

from .stub import Stub

STEPS = 24


@pytest.fixture(autouse=True, scope="module")
def stub_model():
    def create(config, rngs):
        return Stub(rngs, config.vocabulary_size, config.width)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainable, "create_model", create)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), size)) for size in random.integers(1, 8, 50)]
    file = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    texts = (" ".join(random.choice(words, size)) for size in random.integers(5, 120, 200))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, corpus):
    """A run that nothing happens to; `config` has the same settings."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    whole = Config(
        workdir=str(directory / "run"),
        model=FlashConfig(vocabulary_size=257, width=16),
        data=DataConfig(
            source="text",
            path=(corpus,),
            cache_directory=str(directory / "cache"),
            sequence_length=16,
            batch_size=8,
            packing="segments",
        ),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=5),
        train=TrainConfig(steps=STEPS, evaluate_every=8, evaluate_batches=3, log_every=3),
        checkpoint=CheckpointConfig(every=5),
    )
    result = train(whole)
    assert not result.interrupted and result.step == STEPS
    return whole


@pytest.fixture
def config(uninterrupted, tmp_path):
    return dataclasses.replace(uninterrupted, workdir=str(tmp_path / "run"))


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


@pytest.mark.parametrize("packing", ["segments", "concatenate"])
def test_a_killed_run_resumes_bit_for_bit(config, tmp_path, monkeypatch, packing):
    config = change(config, f"data.packing={packing}")
    whole = dataclasses.replace(config, workdir=str(tmp_path / "whole"))
    train(whole)
    for at in (13, 19):
        with monkeypatch.context() as patch:
            call_at(patch, at, kill)
            with pytest.raises(Killed):
                train(config)
    messages = []
    train(config, messages.append)
    assert any("resumed from the checkpoint of step" in message for message in messages)
    assert final_state(config) == final_state(whole)
    assert curve(config) == curve(whole)
    assert [line["step"] for line in curve(config) if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in curve(config) if "validation_loss" in line] == [8, 16, STEPS]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(config, uninterrupted, monkeypatch, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        call_at(patch, 7, lambda: os.kill(os.getpid(), number))
        result = train(config)
    assert result.interrupted and result.step == 7 and result.validation is None
    assert steps_of(config)[-1] == 7 and signal.getsignal(number) is before
    train(config)
    assert final_state(config) == final_state(uninterrupted) and curve(config) == curve(uninterrupted)


def test_resume_on_other_devices(config, uninterrupted, monkeypatch):
    """Same batches in the same order, same losses and parameters to rounding, on three meshes in turn."""
    for at, mesh in ((8, MeshConfig(data=2, fsdp=4)), (14, MeshConfig(data=1, fsdp=8))):
        with monkeypatch.context() as patch:
            call_at(patch, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert train(dataclasses.replace(config, mesh=mesh)).interrupted
    train(config)
    assert final_state(config)[1] == final_state(uninterrupted)[1]
    for name, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-3), ("tokens", 0)):
        values, expected = ([line[name] for line in curve(c) if name in line] for c in (config, uninterrupted))
        np.testing.assert_allclose(values, expected, rtol=tolerance)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), parameters_of(config), parameters_of(uninterrupted)
    )


def flip(file):
    """One bit in every 64 bytes: not all of a file of arrays is read."""
    data = bytearray(file.read_bytes())
    for index in range(0, len(data), 64):
        data[index] ^= 16
    file.write_bytes(data)


ARRAYS = ("model", "training")
DAMAGES = {
    "flipped bits": flip,
    "a cut file": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "no file": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("item", ["model", "training", "meta", "data"])
def test_damage_falls_back_to_the_checkpoint_before(config, uninterrupted, monkeypatch, damage, item):
    with monkeypatch.context() as patch:
        call_at(patch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(config)
    files = list(
        Path(config.workdir, "checkpoints/12", item).glob("ocdbt.process_0/d/*" if item in ARRAYS else "metadata")
    )
    assert files
    for file in files:
        DAMAGES[damage](file)
    messages = []
    train(config, messages.append)
    assert "checkpoint 12" in messages[0] and "cannot be read" in messages[0] and "\n" not in messages[0]
    assert "resumed from the checkpoint of step 10" in messages[1]
    assert Path(config.workdir, "unreadable_checkpoints/12").is_dir()
    assert final_state(config) == final_state(uninterrupted) and curve(config) == curve(uninterrupted)


def test_checksums_notice_one_bit_and_not_the_mesh():
    values = jax.random.normal(jax.random.key(0), (16, 8))
    tree = {"a": values, "b": jax.numpy.arange(5), "c": values.astype("bfloat16"), "d": values > 0}
    partition = sharding.make_partition(MeshConfig(data=2, fsdp=4))
    cut = {**tree, "a": jax.device_put(values, sharding.batch_sharding(partition))}
    meta = {"checksums": {"model": checksums.checksums(tree)}}
    checksums.require_checksums({"model": cut}, meta)
    for name in "abc":
        other = tree[name].at[3].multiply(1.01) if name != "b" else tree[name].at[3].add(1)
        with pytest.raises(ValueError, match=f"model.{name} does not have the checksum"):
            checksums.require_checksums({"model": {**tree, name: other}}, meta)


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


def test_free_settings_may_change_and_a_finished_run_stays_as_it_is(config):
    config = change(config, "train.steps=6")
    first = train(config)
    lines = curve(config)
    again = train(change(config, "train.log_every=1", "train.loss_chunk=7", "checkpoint.keep=1"))
    assert again.validation == first.validation and curve(config) == lines
    longer = train(change(config, "train.steps=9"))
    assert longer.step == 9 and [line["step"] for line in curve(config) if "loss" in line] == list(range(1, 10))


def test_a_checkpoint_beyond_the_end_is_refused(config):
    train(change(config, "train.steps=7"))
    with pytest.raises(ConfigError, match=r"is of step 7, beyond train\.steps=6"):
        train(change(config, "train.steps=6"))


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


def test_divergence_ends_the_run(config):
    with pytest.raises(ConfigError, match="not finite for . steps in a row"):
        train(change(config, "train.max_skipped=3", "optimizer.peak_learning_rate=1e30", "optimizer.warmup_steps=0"))


def test_what_a_run_leaves_behind(config, monkeypatch):
    monkeypatch.setattr(loop, "_PROFILED_STEPS", (2, 3))
    config = change(config, "train.steps=6", "profile", "data.tokenizer=train", "data.tokenizer_vocabulary=257")
    result = train(config)
    workdir = Path(config.workdir)
    record = json.loads((workdir / "run.json").read_text())
    assert record["config"] == section_to_dict(config) and record["starts"][0]["versions"]["jax"] == jax.__version__
    assert (workdir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("events*")) and list((workdir / "profile").rglob("*.xplane.pb"))
    np.testing.assert_allclose(result.validation["perplexity"], np.exp(result.validation["validation_loss"]))
    model, tokenizer, loaded = load_model(config.workdir)
    assert loaded == config and tokenizer.decode(tokenizer.encode("abc def")) == "abc def"
    again, _, _ = load_model(str(workdir / "checkpoints" / "6"))
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    np.testing.assert_array_equal(model(tokens), again(tokens))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=absent.txt", "absent.txt"),
        ("model.vocabulary_size=100", "vocabulary"),
        ("mesh.data=3", "does not fit 8 devices"),
        ("data.batch_size=12", "not divisible"),
        ("workdir=gs://bucket/run", "workdir"),
    ],
)
def test_bad_settings_leave_nothing_behind(config, override, message):
    with pytest.raises(ConfigError, match=message) as error:
        train(change(config, override))
    assert "\n" not in str(error.value) and not Path(config.workdir).exists()


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint"):
        load_model(str(tmp_path / "absent"))
    assert not (tmp_path / "absent").exists()
