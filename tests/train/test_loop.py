"""Whole runs of a very small model: resuming, stopping, files that are left behind."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from lin_jax.experiment import ConfigError, MeshConfig
from lin_jax.settings.dictionaries import section_to_dict
from lin_jax.train import loop
from lin_jax.train.loop import train
from lin_jax.train.saved_model import load_model

from .small_run import STEPS, Killed, call_at, change, curve, final_state, kill, parameters_of, steps_of

pytestmark = pytest.mark.usefixtures("stub_model")


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
