"""Values of the types that annotations name: settings, which check theirs, and what files of other programs hold."""

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from lin_jax.settings.base import ConfigError, require

# The largest whole number of a setting that names no other.
LARGEST = 2**31 - 1
# What a message shows of a value.
_SHOWN = 80
_BITS = 63
_ONE = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "an object", list: "a list"}
_MANY = {bool: "true or false", int: "whole numbers", float: "numbers", str: "texts", dict: "objects", list: "lists"}


class Settings:
    """A group of settings: a frozen dataclass whose fields hold what their annotations say, see `fit`.

    Attributes:
        former: names that fields had in settings that were saved earlier, and what they are called now; None: nothing
            is left of them.
    """

    former: ClassVar[Mapping[str, str | None]] = {}
    # Those who check annotations at run time would be first, with another error.
    __no_type_check__: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a value that does not suit its field, or others."""
        annotations = annotations_of(type(self))
        for field in dataclasses.fields(typing.cast(Any, self)):
            value = fit(getattr(self, field.name), annotations[field.name], field.name)
            _require_bounded(value, field.metadata.get("most"), field.name)
            object.__setattr__(self, field.name, value)
        self._check()

    def _check(self) -> None:
        """Raise `ConfigError`, with a field's name at its beginning, for values of the right types that are wrong."""


def annotations_of(kind: Any) -> dict[str, Any]:
    """Return the annotated types of a dataclass's fields by their names."""
    return _annotations(kind)


@functools.cache
def _annotations(kind: Any) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        hints |= inspect.get_annotations(base, eval_str=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _require_bounded(value: Any, most: int | float | None, name: str) -> None:
    """Raise `ConfigError` for a number that is only a slip, before something of that size is made."""
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            _require_bounded(item, most, f"{name}[{index}]")
    elif isinstance(value, int) and not isinstance(value, bool):
        least, most = -LARGEST, LARGEST if most is None else most
        require(value <= most, f"{name} must be at most {most}, but is {value}")
        require(value >= least, f"{name} must be at least {least}, but is {value}")
    elif isinstance(value, float) and most is not None:
        require(value <= most, f"{name} must be at most {most}, but is {value}")


class _WrongType(ConfigError):
    """A value of another type than is due."""

    def __init__(self, value: Any, annotation: Any, name: str):
        super().__init__(f"{name} must be {type_name(annotation)}, but is {shown(value)}")
        self.name = name


def fit(value: Any, annotation: Any, name: str) -> Any:
    """Return `value` as an annotation wants it.

    A whole number is a number too, but true and false are no numbers, and 64.0 is no whole number. Scalars of NumPy
    become those of Python. A list becomes a tuple where a tuple is due.

    Args:
        value: anything.
        annotation: bool, int, float, str, `None`, a `Literal`, a class, or lists, tuples, dictionaries by str, and
            unions of them.
        name: the value's name in the message.

    Raises:
        ConfigError: the value is of another type, or a number that is not finite or has more than 64 bits, or text
            that is no Unicode.
    """
    value = value.item() if isinstance(value, np.generic) else value
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _fit_union(value, annotation, name)
    if origin in (list, tuple) and isinstance(value, (list, tuple) if origin is tuple else list):
        return _fit_items(value, origin, arguments, name)
    if origin is dict and isinstance(value, dict):
        member = arguments[1] if arguments else Any
        return {fit(key, str, f"a key of {name}"): fit(item, member, f"{name}.{key}") for key, item in value.items()}
    if origin is Any or _is_one(value, origin, arguments):
        return _checked(value, origin, name)
    raise _WrongType(value, annotation, name)


def type_name(annotation: Any, *, several: bool = False) -> str:
    """Return what messages call an annotated type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(member, several=several) for member in arguments)
    if origin in (list, tuple):
        return ("lists of " if several else "a list of ") + type_name(arguments[0], several=True)
    if origin is dict:
        return ("objects" if several else "an object") + " of " + type_name(arguments[1], several=True)
    if annotation in (None, type(None)):
        return "None"
    return str((_MANY if several else _ONE).get(annotation) or getattr(annotation, "__name__", annotation))


def shown(value: Any) -> str:
    """Return a value as messages show it, cut where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = f'"{value}"' if isinstance(value, str) else repr(value)
    except Exception:  # an integer of too many digits, or what somebody's class does
        text = f"a very large {type(value).__name__}" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def is_unicode(text: str) -> bool:
    """Return whether a text can be written in UTF-8: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fit_union(value: Any, annotation: Any, name: str) -> Any:
    wrong: ConfigError = _WrongType(value, annotation, name)
    for member in typing.get_args(annotation):
        try:
            return fit(value, member, name)
        except ConfigError as error:  # What is wrong inside the value tells more than that it does not fit.
            wrong = wrong if isinstance(error, _WrongType) and error.name == name else error
    raise wrong


def _fit_items(value: Any, origin: Any, arguments: tuple[Any, ...], name: str) -> Any:
    member = arguments[0] if arguments else Any
    return origin(fit(item, member, f"{name}[{index}]") for index, item in enumerate(value))


def _is_one(value: Any, origin: Any, arguments: tuple[Any, ...]) -> bool:
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (None, type(None)):
        return value is None
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool)
    return isinstance(value, origin)


def _checked(value: Any, origin: Any, name: str) -> Any:
    """Return a value of the right type, where this type cannot hold it whole raise `ConfigError`."""
    if isinstance(value, str):
        require(is_unicode(value), f"{name} holds half of a surrogate pair, which is no text: {shown(value)}")
    elif isinstance(value, int) and origin in (int, float):
        bound = f"must lie between -2**{_BITS} and 2**{_BITS} - 1"
        require(-(2**_BITS) <= value < 2**_BITS, f"{name} {bound}, but is {shown(value)}")
    elif isinstance(value, float):
        require(math.isfinite(value), f"{name} must be a finite number, but is {value}")
    return float(value) if origin is float else value
