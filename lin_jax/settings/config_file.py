"""Configuration files: Python files with a `get_config()`. Whatever goes wrong in one, is told in a line."""

import inspect
import traceback
import types
from collections.abc import Callable
from typing import Any

from lin_jax.settings.base import ConfigError, first_line, require
from lin_jax.settings.foreign import read_bytes

# Of the longest file that somebody could have written.
_MAX_BYTES = 1 << 20


def call_get_config(path: str) -> Any:
    """Return what the `get_config()` of a Python file gives.

    Args:
        path: `file.py`, or `file.py:text` for `get_config("text")`.

    Raises:
        ConfigError: the file cannot be run, or an exception came out of it; the message names its line.
    """
    name, ends, argument = path.partition(".py:")
    file = f"{name}.py" if ends else path
    code = _run(lambda: compile(read_bytes(file, _MAX_BYTES), file, "exec", dont_inherit=True), file)
    module = types.ModuleType("lin_jax_experiment")
    module.__file__ = file
    _run(lambda: exec(code, module.__dict__), file)
    get_config: Any = getattr(module, "get_config", None)
    require(callable(get_config), f"configuration file {file} has no get_config()")
    signature = _run(lambda: inspect.signature(get_config), file)
    given = [argument] if argument else []
    require(bool(signature.parameters) or not given, f"get_config() of {file} takes no argument, but has {argument!r}")
    try:
        signature.bind(*given)
    except TypeError as error:
        raise ConfigError(f"get_config() of {file}: {error}; its argument is given as {file}:TEXT") from error
    return _run(lambda: get_config(*given), file)


def _run(do: Callable[[], Any], file: str) -> Any:
    """Return `do()`, whose exceptions are told with the line of the file from which they come."""
    try:
        return do()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # A file may do anything, such as exit.
        raise ConfigError(_message(error, file)) from error


def _message(error: BaseException, file: str) -> str:
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{_place(file, error.lineno)}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = _place(file, lines[-1] if lines else None)
    if isinstance(error, ConfigError):
        return f"{place}: {error}" if lines else str(error)
    told = first_line(error)
    kind = type(error).__name__
    return f"{place}: {told}" if told == kind else f"{place}: {kind}: {told}"


def _place(file: str, line: int | None) -> str:
    return f"{file}, line {line}" if line else file
