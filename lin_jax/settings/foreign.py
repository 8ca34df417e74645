"""JSON that other programs wrote, or people: one reader, which gives values of the types that are asked for.

    config = read_object(directory / "config.json")
    width = config.get("hidden_size", int)                    # ConfigError where it is missing, null or no whole number
    heads = config.get("num_key_value_heads", int, None)      # None where it is missing or null
    scaling = config.section("rope_scaling")                  # empty where it is missing or null
    factor = scaling.get("factor", float, 1.0)                # 8 is fine, and gives 8.0
    targets = config.get("target_modules", list[str] | str)   # any annotation of lists, dicts by str, Literals, unions
    config.require(heads in (None, 8), "num_key_value_heads must be 8")    # an error with the file's name before it

Every error is a `ConfigError` of one line that begins with the file (or line) and names the field:

    DIR/config.json: hidden_size must be a whole number, but is "64"

What is read is bounded: files that are no regular ones (a pipe, a device, a directory) are refused before they are
opened, and so are those above a size, nesting deeper than `DEPTH`, NaN and Infinity, numbers that float64 cannot hold,
halves of surrogate pairs, names that stand twice in an object with different values, and, but in lines of JSONL, which
hold texts, NUL characters. UTF-8 may begin with its mark of byte order.
"""

import json
import math
import os
import stat
import typing
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from etils import epath

from lin_jax.settings.base import ConfigError, first_line, require
from lin_jax.settings.typed import fit, is_unicode, shown

# The largest files of settings are indexes and trees of some megabytes.
MAX_BYTES = 64 << 20
# Of arrays and objects in each other.
DEPTH = 64
_TOO_DEEP = f"arrays and objects are nested more than {DEPTH} deep"
# Of a whole number; what does not fit into 64 bits is refused where a whole number is asked for.
_DIGITS = 100

T = TypeVar("T")
D = TypeVar("D")


class _Required:
    """Stands for no default."""


class _Refused(Exception):
    """JSON that is not taken, and why."""


class Fields:
    """The fields of a JSON object, by name. A field that is null counts as one that is not there.

    Attributes:
        place: the file or line, and the section in it, for messages.
        values: the object as it stands in the file, nulls included.
    """

    def __init__(self, values: dict[str, Any], place: str, prefix: str = ""):
        """Take over an object that was read, of which `prefix` says where in the file it stands."""
        self.values, self.place, self._prefix = values, place, prefix

    def __contains__(self, name: object) -> bool:
        return self.values.get(typing.cast(str, name)) is not None

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.values if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @typing.overload
    def get(self, name: str, kind: type[T]) -> T: ...
    @typing.overload
    def get(self, name: str, kind: type[T], default: D) -> T | D: ...
    @typing.overload
    def get(self, name: str, kind: Any, default: Any = ...) -> Any: ...

    def get(self, name: str, kind: Any, default: Any = _Required) -> Any:
        """Return a field's value, or the default where it is missing or null.

        Args:
            name: the field.
            kind: the annotation of its type, such as `int`, `list[str]`, `dict[str, float]` or `list[int] | None`;
                `Any` takes what there is.
            default: what a missing field means; without one it is an error.

        Raises:
            ConfigError: the field is of another type, or is missing and has no default.
        """
        if name in self:
            return fit(self.values[name], kind, f"{self.place}: {self._prefix}{name}")
        if default is _Required:
            raise ConfigError(f"{self.place}: {self._prefix}{name} is missing")
        return default

    def section(self, name: str) -> "Fields":
        """Return the fields of an object in this one, none where it is missing or null; raise `ConfigError`."""
        return Fields(self.get(name, dict, {}), self.place, f"{self._prefix}{name}.")

    def require(self, condition: bool, message: str) -> None:
        """Raise `ConfigError` with the file and `message`, which begins with a field, unless `condition` holds."""
        require(condition, f"{self.place}: {self._prefix}{message}")


def read_bytes(path: epath.PathLike, limit: int = MAX_BYTES) -> bytes:
    """Return all of a file, local or remote.

    Raises:
        ConfigError: it is missing, cannot be read, is no regular file, or has more than `limit` bytes.
    """
    path = epath.Path(path)
    try:
        # A pipe would be waited for, a device never ends.
        regular = "://" in str(path) or stat.S_ISREG(os.stat(path).st_mode)
        content = _first_bytes(path, limit + 1) if regular else b""
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from error
    require(regular, f"{path} is not a file")
    require(len(content) <= limit, f"{path} is too large: more than {limit} bytes")
    return content


def _first_bytes(path: epath.Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def read_object(path: epath.PathLike, limit: int = MAX_BYTES) -> Fields:
    """Return the fields of a file that holds one JSON object; raise `ConfigError`."""
    return Fields(read_json(path, dict, limit), str(path))


def read_json(path: epath.PathLike, kind: Any = Any, limit: int = MAX_BYTES) -> Any:
    """Return what a file of JSON holds, of the annotated type `kind`; raise `ConfigError`."""
    return fit(_parsed(read_bytes(path, limit), str(path), nul=False), kind, f"{path}: the content")


def line_object(line: bytes | str, place: str) -> Fields:
    """Return the fields of one line of JSONL, at a place such as `prompts.jsonl, line 3`; raise `ConfigError`."""
    return Fields(fit(_parsed(line, place, nul=True), dict, f"{place}: the line"), place)


def _parsed(content: bytes | str, place: str, *, nul: bool) -> Any:
    """Return a JSON value within the bounds that this file names; raise `ConfigError`."""
    try:
        text = content if isinstance(content, str) else content.decode()
        value = json.loads(
            text.removeprefix("\ufeff"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
        _check(value, nul, DEPTH)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place} is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place} is not JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{place}: {_TOO_DEEP}") from error
    except _Refused as error:
        raise ConfigError(f"{place}: {error}") from error
    return value


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; which of two values a name has, programs do not agree about."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values and not _same(values[name], value):
            raise _Refused(f"the name {shown(name)} stands twice, with different values")
        values[name] = value
    return values


def _same(first: Any, second: Any) -> bool:
    """Return whether two values are the same JSON; for Python, 1, 1.0 and True are equal."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def _refuse_constant(text: str) -> float:
    raise _Refused(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"the number {text[:80]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise _Refused(f"the number {text[:_DIGITS]}... is too large")
    return int(text)


def _check(value: Any, nul: bool, depth: int) -> None:
    """Raise `_Refused` where something in `value` is no text or nested too deep."""
    if isinstance(value, str):
        if not nul and "\0" in value:
            raise _Refused(f"a text holds a NUL character: {shown(value)}")
        if not is_unicode(value):
            raise _Refused(f"a text holds half of a surrogate pair: {shown(value)}")
    elif isinstance(value, (list, dict)):
        if depth == 0:
            raise _Refused(_TOO_DEEP)
        for item in value:  # of an object, its names
            _check(item, nul, depth - 1)
        for item in value.values() if isinstance(value, dict) else ():
            _check(item, nul, depth - 1)
