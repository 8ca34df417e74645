"""Processes that are really killed; `python -m benchmarks.resume --kills 200` is the long version."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.resume import differences

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The directory of two kills, and what was printed."""
    directory = tmp_path_factory.mktemp("resume")
    command = [sys.executable, "-m", "benchmarks.resume", "--kills", "2", "--seed", "3", "--directory", str(directory)]
    return directory, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)


def test_killed_at_random_moments_its_directory_is_that_of_the_undisturbed_run(killed):
    directory, result = killed
    assert result.returncode == 0 and "2 kills with SIGKILL" in result.stdout, result.stdout + result.stderr
    assert "0 files or arrays differ" in result.stdout and result.stdout.count("killed at: ") == 2
    runs = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
    assert sum(len(run["kills"]) for run in runs) == 2


def flip_last(file):
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda run: flip_last(run / "tokenizer/tokenizer.json"), "tokenizer/tokenizer.json"),
        (lambda run: (run / "tokenizer/.tokenizer.json.part").touch(), "tokenizer/.tokenizer.json.part"),
        (lambda run: (run / "learning_curve.png").unlink(), "learning_curve.png"),
        (lambda run: (run / "left").mkdir(), "left"),
        (lambda run: cut_last_line(run / "metrics.jsonl"), "metrics.jsonl"),
        (lambda run: shutil.copytree(run / "checkpoints/12", run / "checkpoints/9"), "checkpoints/9/data/metadata"),
    ],
)
def test_the_comparison_notices(killed, tmp_path, change, name):
    whole, run = killed[0] / "whole", tmp_path / "run"
    shutil.copytree(whole, run)
    assert differences(run, whole, exact=True) == []
    change(run)
    assert name in differences(run, whole, exact=True)


def cut_last_line(file):
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
