"""How programs end: a line and a code, whatever happens, and never a traceback."""

import os
import signal
import subprocess
import sys

import pytest

from lin_jax.settings.base import ConfigError
from lin_jax.settings.program import exit_code


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("field must be 1"), 2, "error: field must be 1\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
        (MemoryError(), 2, "error: out of memory (MemoryError): ask for less at a time\n"),
        (
            *(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"), 2),
            "error: out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.): ask for less at a time\n",
        ),
    ],
)
def test_what_the_user_can_change_takes_one_line(error, code, line, capsys):
    assert exit_code(raising(error)) == code
    assert capsys.readouterr().err == line


def test_what_the_user_cannot_change_is_raised():
    for error in (RuntimeError("a bug"), ZeroDivisionError()):
        with pytest.raises(type(error)):
            exit_code(raising(error))


def program(body):
    code = f"import sys\nfrom lin_jax.settings.program import exit_code\n{body}\nsys.exit(exit_code(run))"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_second_ctrl_c_ends_the_process_at_once():
    """The first is answered by the exit code, the second while the process ends: no traceback from either."""
    body = """
import atexit
def run():
    def end():
        print("ending", flush=True)
        sys.stdin.readline()
    atexit.register(end)
    print("running", flush=True)
    sys.stdin.readline()
"""
    process = program(body)
    assert process.stdout.readline() == b"running\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"ending\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and error == b""


def test_a_first_ctrl_c_gives_its_exit_code():
    process = program("def run():\n    print('running', flush=True)\n    sys.stdin.readline()")
    assert process.stdout.readline() == b"running\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == b""


def test_ctrl_c_in_a_callback_of_garbage_collection_is_not_lost():
    """Python prints what is raised there, and goes on."""
    body = """
import gc, signal
def run():
    def interrupt(*_):
        gc.callbacks.remove(interrupt)
        signal.raise_signal(signal.SIGINT)
    gc.callbacks.append(interrupt)
    gc.collect()
    print("running", flush=True)
    sys.stdin.readline()
"""
    process = program(body)
    assert process.stdout.readline() == b"running\n"
    assert process.wait(timeout=60) == 130 and process.stderr.read() == b""


def test_a_reader_that_went_away_is_no_error():
    process = program("def run():\n    sys.stdin.readline()\n    print('a' * 1000000)\n    print('b')")
    process.stdout.close()
    _, error = process.communicate(b"\n", timeout=60)
    assert process.returncode == 0 and error == b""


def test_characters_that_a_terminal_does_not_know_are_shown_by_number():
    code = "import sys\nfrom lin_jax.settings.program import exit_code\nsys.exit(exit_code(lambda: print('é猫')))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout == rb"\xe9\u732b" + b"\n"
