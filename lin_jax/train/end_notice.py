"""Says why a process ended that cannot say it itself, because JAX aborted it or it was killed.

A program of its own, started beside a process of several. It reads what that process sends through a pipe, which ends
with the process: Python's line about a fatal error, and `DONE` when there is nothing left to be said.
"""

import faulthandler
import os
import signal
import subprocess
import sys

DONE = b"\xff"
ABORTED = b"Fatal Python error: Aborted"
AGAIN = "start the same command again on every host: the run goes on from its last checkpoint"


class EndNotice:
    """The program beside this process."""

    def __init__(self, who: str):
        """Start it; `who` names this process."""
        command = [sys.executable, "-I", "-S", __file__, who]
        self._program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0)
        assert self._program.stdin is not None
        self._pipe = self._program.stdin.fileno()
        os.set_blocking(self._pipe, False)
        # It writes without Python, where a handler of SIGABRT in Python would come too late.
        faulthandler.enable(self._pipe, all_threads=False)

    def cancel(self) -> None:
        """Say nothing: this process, which is about to end, has said what there is to say."""
        os.write(self._pipe, DONE)


def notice(who: str, heard: bytes) -> str | None:
    """Return what is to be said of a process that ended after these bytes."""
    if DONE in heard:
        return None
    if ABORTED in heard:
        return f"error: {who} was stopped because another one ended or cannot be reached; {AGAIN}"
    return f"error: {who} was killed, and the others will stop; {AGAIN}"


def main() -> None:
    """Wait for the end of the process that started this program."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    said = notice(sys.argv[1], sys.stdin.buffer.read())
    if said is not None:
        print(said, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
