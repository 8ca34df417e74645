"""Says why a process ended that cannot say it itself, because JAX aborted it or it was killed.

A program of its own, started beside a process of several. It reads what that process sends through a pipe, which ends
with the process: the numbers of the signals that it gets, and `SPOKEN` when there is nothing left to be said.
"""

import os
import signal
import subprocess
import sys

# No signal has this number.
SPOKEN = b"\xff"
AGAIN = "start the same command again on every host: the run goes on from its last checkpoint"


class LastWords:
    """The program beside this process."""

    def __init__(self, who: str):
        """Start it; `who` names this process. Call it in the main thread."""
        command = [sys.executable, "-I", "-S", __file__, who]
        self._program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0)
        assert self._program.stdin is not None
        self._pipe = self._program.stdin.fileno()
        os.set_blocking(self._pipe, False)
        # Python notes a signal in the pipe at once, if it has a handler, which itself would come too late.
        signal.signal(signal.SIGABRT, lambda number, frame: None)
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)

    def spare(self) -> None:
        """This process, which is about to end, has said what there is to say."""
        os.write(self._pipe, SPOKEN)


def words(who: str, heard: bytes) -> str | None:
    """What is to be said of a process that ended after these bytes."""
    if SPOKEN in heard:
        return None
    if signal.SIGABRT in heard:
        return f"error: {who} was stopped because another one ended or cannot be reached; {AGAIN}"
    return f"error: {who} was killed, and the others will stop; {AGAIN}"


def main() -> None:
    """Wait for the end of the process that started this program."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    said = words(sys.argv[1], sys.stdin.buffer.read())
    if said is not None:
        print(said, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
