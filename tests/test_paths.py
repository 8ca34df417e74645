"""Files that are written whole or not at all."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

from lin_jax.paths import write_whole

ROOT = Path(__file__).parent.parent
# Dies at one of the changes that it makes to files.
KILLED = """
import os, signal, sys
from pathlib import Path
from lin_jax.paths import write_whole
at = int(sys.argv[2])
def watch(event, arguments):
    global at
    if event in ("open", "os.rename") and str(arguments[0]).startswith(sys.argv[1]):
        at -= 1
        if at < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
write_whole(Path(sys.argv[1], "file"), b"new" * 10000)
"""


@hypothesis.given(before=strategies.none() | strategies.binary(), content=strategies.binary())
def test_a_file_has_its_content_and_nothing_is_left_beside_it(tmp_path_factory, before, content):
    file = tmp_path_factory.mktemp("whole") / "deeper" / "file"
    if before is not None:
        file.parent.mkdir()
        file.write_bytes(before)
    write_whole(file, content)
    assert file.read_bytes() == content and list(file.parent.iterdir()) == [file]


def test_what_is_there_already_is_left_alone(tmp_path):
    file = tmp_path / "file"
    write_whole(file, b"same")
    before = os.stat(file)
    write_whole(file, b"same")
    after = os.stat(file)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("at", range(4))
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path, at):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(at)], cwd=ROOT, timeout=120)
    assert result.returncode == (-9 if at < 3 else 0), "the old file read, the new one opened, and renamed"
    assert file.read_bytes() == (b"old" if at < 3 else b"new" * 10000)
    write_whole(file, b"new" * 10000)
    assert file.read_bytes() == b"new" * 10000 and list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "more").touch()
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "file", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and stat.S_ISDIR(os.stat(tmp_path / "file").st_mode)
