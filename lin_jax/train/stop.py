"""Stopping when asked to, by SIGTERM or Ctrl-C.

While there is something to save, the first signal lets the running step end and its state be saved. At any other time,
and when it comes again, the process ends at once: whatever is on the disk then is whole, as after a kill.

This file imports nothing heavy, so that a program answers signals while it imports the rest.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class StopRequest:
    """Whether a run is to be saved and ended. For callers of `train`: outside of `saving`, signals do what they did.

    Attributes:
        requested: whether a signal has come.
    """

    requested = False

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """While entered, take note of the first signal; after it, signals do what they did before."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Other threads cannot have handlers.
            return
        former = {number: signal.getsignal(number) for number in _NAMES}

        def note(number: int, frame: FrameType | None) -> None:
            self._note(number)
            for name, handler in former.items():
                signal.signal(name, handler)

        for number in _NAMES:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _note(self, number: int) -> None:
        self.requested = True
        _say(f"{_name(number)}: saving after this step, then stopping; once more stops at once, without saving")


class ProgramStop(StopRequest):
    """For a program, from now to its end. A thread of its own answers, also while the main one is inside a library."""

    def __init__(self) -> None:
        """Begin to answer; call it in the main thread."""
        self._is_saving = False
        heard, told = os.pipe()
        os.set_blocking(told, False)
        for number in _NAMES:
            signal.signal(number, _leave_to_thread)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        threading.Thread(target=self._answer, args=(heard,), name="signals", daemon=True).start()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """While entered, the first signal is noted, and the second ends the process."""
        self._is_saving = True
        try:
            yield
        finally:
            self._is_saving = False

    def _answer(self, heard: int) -> NoReturn:
        """Act on the numbers of signals, which Python writes into a pipe as they come."""
        while True:
            number = os.read(heard, 1)[0]
            if number not in _NAMES:
                continue
            if not self._is_saving or self.requested:
                _say(f"{_name(number)}: stopped; the same command goes on from what is saved, or starts again")
                os._exit(128 + number)
            self._note(number)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: a signal without a handler would not be written into the pipe."""


def _name(number: int) -> str:
    return _NAMES[signal.Signals(number)]


def _say(line: str) -> None:
    """Print a line, whichever locks the interrupted code holds."""
    os.write(2, f"{line}\n".encode())
