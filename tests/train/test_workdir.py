"""A run's directory: one run at a time, and a tokenizer that is the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from lin_jax.experiment import ConfigError
from lin_jax.train.workdir import KEPT_TOKENIZER, RunLock, tokenizer_fingerprint

ROOT = Path(__file__).parent.parent.parent
HOLDER = """
import sys
from lin_jax.train.workdir import RunLock
lock = RunLock(sys.argv[1])
lock.take()
print("taken", flush=True)
sys.stdin.read()
"""


def test_one_run_at_a_time(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, text=True, **pipes)
    lock = RunLock(str(tmp_path))
    try:
        assert holder.stdout.readline() == "taken\n"
        with pytest.raises(ConfigError, match="another run is at work in config.workdir="):
            lock.take()
    finally:
        holder.kill()
        holder.communicate()
    lock.take()
    lock.take()
    with pytest.raises(ConfigError, match="another run"):
        RunLock(str(tmp_path)).take()
    lock.close()
    RunLock(str(tmp_path)).take()
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_there_is_not_made(tmp_path):
    lock = RunLock(str(tmp_path / "absent"))
    lock.take()
    lock.close()
    assert not (tmp_path / "absent").exists()


def test_a_tokenizers_fingerprint_is_that_of_names_and_contents(tmp_path):
    files = {"tokenizer.json": b"{}", "tokenizer_info.json": b"{}", f"{KEPT_TOKENIZER}/chat_template.jinja": b"a"}
    for name, content in files.items():
        file = tmp_path / "tokenizer" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    first = tokenizer_fingerprint(str(tmp_path))
    (tmp_path / "tokenizer" / ".tokenizer.json.part").write_bytes(b"left by a kill")
    assert tokenizer_fingerprint(str(tmp_path)) == first
    for name, content in files.items():
        file = tmp_path / "tokenizer" / name
        file.write_bytes(content + b" ")
        assert tokenizer_fingerprint(str(tmp_path)) != first
        file.write_bytes(content)
    assert tokenizer_fingerprint(str(tmp_path)) == first
    (tmp_path / "tokenizer" / "tokenizer.json").rename(tmp_path / "tokenizer" / "other.json")
    assert tokenizer_fingerprint(str(tmp_path)) != first
