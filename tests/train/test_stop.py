"""Stopping by signals: what a process says, and with what code it ends, whatever it is doing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lin_jax.train.stop import StopRequest

ROOT = Path(__file__).parent.parent.parent
# It waits inside of the operating system, as a run does inside of a library, and never comes back by itself.
PROGRAM = """
import os
from lin_jax.train.stop import ProgramStop
stop = ProgramStop()
def wait(word):
    print(word, flush=True)
    os.read(0, 1)
{body}
"""
SAVING = """
with stop.saving():
    wait("waiting")
    print("requested:", stop.requested, flush=True)
wait("saved")
"""


@pytest.fixture
def start():
    started = []

    def start(body):
        command = [sys.executable, "-c", PROGRAM.format(body=body)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_with_nothing_to_save_a_signal_ends_a_program_in_a_line(start, number, name):
    process = start('wait("waiting")')
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    process.wait(timeout=60)  # Its input stays open: it ends by the signal alone.
    output, errors = process.communicate()
    assert process.returncode == 128 + number and output == ""
    assert errors.startswith(f"{name}: stopped") and errors.count("\n") == 1


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_ends_at_once(start, first, second):
    process = start(SAVING)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(first)
    assert "saving after this step" in process.stderr.readline()
    process.send_signal(second)
    process.wait(timeout=60)  # Its input stays open: it ends by the signal alone.
    output, errors = process.communicate()
    assert process.returncode == 128 + second and output == ""
    assert "stopped" in errors and errors.count("\n") == 1


def test_what_is_to_be_saved_is_saved(start):
    process = start(SAVING)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    assert "saving after this step" in process.stderr.readline()
    process.stdin.write("xx")
    process.stdin.flush()
    assert process.stdout.readline() == "requested: True\n" and process.stdout.readline() == "saved\n"


def test_callers_of_train_get_their_handlers_back(capfd):
    request, before = StopRequest(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), request.saving():
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.requested and signal.getsignal(signal.SIGINT) is before
        assert capfd.readouterr().err.count("\n") == 1
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with request.saving():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
