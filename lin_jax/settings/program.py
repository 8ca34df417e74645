"""What programs do with errors, Ctrl-C and readers that go away: one line at most, and an exit code.

`train.py` alone has its own: it saves before it stops.
"""

import io
import os
import signal
import sys
from collections.abc import Callable

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
