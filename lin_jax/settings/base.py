"""What settings are made of: documented fields of dataclasses that check themselves, and the error that names one."""

import dataclasses
from collections.abc import Callable
from typing import Any

# Characters of a message.
_LONGEST = 2000


class ConfigError(ValueError):
    """A setting or an input that the user has to change; its message is one line that names it and says how."""

    def __init__(self, message: str):
        """Take a message; characters that do not print become escapes, and one of many pages is cut."""
        # What names the input may be anybody's text: a path, a key of a file, a library's error.
        cut = message if len(message) <= _LONGEST else f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut))


def first_line(error: BaseException) -> str:
    """Return what an error says in one line, for messages that hold it."""
    try:
        text = str(error).strip()
    except Exception:  # anybody's exception may fail to say what it is
        text = ""
    return (text or type(error).__name__).splitlines()[0][:300]


def setting(default: Any, doc: str, *, most: int | float | None = None) -> Any:
    """Return a dataclass field with its documentation, which `--help` prints.

    Args:
        default: its value where none is given.
        doc: what it means.
        most: the largest number that is not only a slip, whose allocation would fail or never end.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "most": most})


def section(default: Callable[[], Any], doc: str) -> Any:
    """Return a dataclass field that is itself a group of settings."""
    return dataclasses.field(default_factory=default, metadata={"doc": doc})


def variants(default: Callable[[], Any], registry: Any, doc: str) -> Any:
    """Return a dataclass field that is one of several sections, those of the entries of a `Registry`.

    Which of them it is, the field `registry.field` of the section says, such as `kind` of an attention.
    """
    return dataclasses.field(default_factory=default, metadata={"doc": doc, "registry": registry})


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(config: Any, *names: str) -> None:
    """Raise `ConfigError` unless the fields `names` of a section are greater than 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name} must be greater than 0, but is {value}")


def require_at_least_zero(config: Any, *names: str) -> None:
    """Raise `ConfigError` unless the fields `names` of a section are 0 or more."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{name} must be 0 or more, but is {value}")


def require_paths(config: Any, *names: str) -> None:
    """Raise `ConfigError` unless the fields `names` of a section, texts or tuples of them, can be paths or names."""
    for name in names:
        value = getattr(config, name)
        texts = value if isinstance(value, tuple) else (value or "",)
        require(not any("\0" in text for text in texts), f"{name} must not hold a NUL character, but is {value!r}")


# Documentation of settings that every model has.
DTYPE_DOC = "type of activations; parameters have their own: float32 in training, or as they were converted"


REMAT_DOC = "what the backward pass recomputes: nothing, whole layers (least memory), or all but matrix products"
