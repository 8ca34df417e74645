"""Stopping when asked to: SIGTERM and Ctrl-C let the running step end and its state be saved."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, takes note of SIGTERM and SIGINT; a second one has its usual effect."""

    def __init__(self) -> None:
        self._asked = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Start to take note, if this is the main thread: others cannot have handlers."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give back the former handlers."""
        self._restore()

    def requested(self, *, agree: bool) -> bool:
        """Whether to stop now.

        Args:
            agree: this is a step at which all processes ask. They stop together, whichever was told to; a single
                process may ask at any step.
        """
        if jax.process_count() == 1:
            return self._asked
        return agree and bool(multihost_utils.process_allgather(np.array(self._asked)).any())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
