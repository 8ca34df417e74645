"""What programs do with errors, Ctrl-C and readers that go away: one line at most, and an exit code.

`train.py` alone has its own: it saves before it stops.
"""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from lin_jax.settings.base import ConfigError, first_line


def exit_code(run: Callable[[], None]) -> int:
    """Do what a program is there for, and return its exit code.

    Codes: 0 done, also where who reads standard output has seen enough; 2 a setting or an input is wrong, or there is
    no memory for it; 130 Ctrl-C. Another Ctrl-C after the first ends the process at once.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # A terminal that does not know a character shows its number.
            stream.reconfigure(errors="backslashreplace")
    try:
        with _interrupts_kept():
            run()
        sys.stdout.flush()
    except BrokenPipeError:  # What is still buffered must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return 130
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:  # JAX's errors are of the latter.
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"error: out of memory ({first_line(error)}): ask for less at a time", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Raise Ctrl-C again, a moment later, where it came while Python could only print it and go on.

    That is in destructors and callbacks of garbage collection, of which JAX has one.
    """
    before = sys.unraisablehook

    def raise_again(what: Any) -> None:
        if what.exc_type is KeyboardInterrupt:
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            before(what)

    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = before
