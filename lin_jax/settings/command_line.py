"""Settings from a file and the command line: `--config configs/x.py --config.optimizer.peak_learning_rate=1e-4`.

All overrides are collected first and every dataclass is then rebuilt once, so the order in which they are given does
not matter and only the final settings have to agree with each other.
"""

import argparse
import ast
import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lin_jax.experiment import Config
from lin_jax.settings.base import ConfigError, require
from lin_jax.settings.config_file import call_get_config
from lin_jax.settings.typed import annotations_of

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a Python file, with overrides from the command line.

    Args:
        path: a file with a `get_config()` that returns a `Config`; `file.py:text` calls `get_config("text")`.
        overrides: `--config.section.field=value`; a bool may be given as `--config.field` alone.

    Raises:
        ConfigError: the file, a field or a value is wrong; the message names it.
    """
    config = call_get_config(path)
    require(
        isinstance(config, Config), f"get_config() of {path} must return a Config, but gives {type(config).__name__}"
    )
    return apply_overrides(config, overrides)


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of `config` with `--config.section.field=value` strings applied; raises `ConfigError`."""
    changes: dict[str, Any] = {}
    for override in overrides:
        _collect(config, override, changes)
    return _rebuild(config, changes, "config")


def config_to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain nested dictionaries that JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(values: dict[str, Any], kind: type = Config, name: str = "config") -> Any:
    """The inverse of `config_to_dict`; raises `ConfigError` for a field that does not exist or fit."""
    annotations = annotations_of(kind)
    fields = {}
    for key, value in values.items():
        require(key in annotations, f"unknown field {name}.{key}{_nearest(key, annotations)}")
        annotation = annotations[key]
        registry = _metadata(kind, key).get("registry")
        if registry is not None:
            default = _default(kind, key)
            annotation = registry[value.get(registry.field, getattr(default, registry.field))].settings
        if dataclasses.is_dataclass(annotation):
            fields[key] = config_from_dict(value, typing.cast(type, annotation), f"{name}.{key}")
        else:
            fields[key] = tuple(value) if isinstance(value, list) else value
    return _build(lambda: kind(**fields), kind, name)


def _metadata(kind: Any, key: str) -> Any:
    return {field.name: field.metadata for field in dataclasses.fields(kind)}.get(key, {})


def _default(kind: Any, key: str) -> Any:
    return next(typing.cast(Any, field).default_factory() for field in dataclasses.fields(kind) if field.name == key)


def config_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--config`, whose `--help` lists every setting; its errors are raised as `ConfigError`."""
    parser = OneLineParser(
        description=description,
        epilog="settings, with their defaults before the file is read:\n\n" + describe(Config()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:TEXT]", help="Python file with get_config(); TEXT is its argument"
    )
    return parser


def describe(config: Any, name: str = "config") -> str:
    """One paragraph a setting: its full name, type, value and documentation."""
    lines = []
    annotations = annotations_of(type(config))
    for field in dataclasses.fields(config):
        value, full_name = getattr(config, field.name), f"{name}.{field.name}"
        if not dataclasses.is_dataclass(value):
            lines.append(f"  --{full_name}={_show(value)}  ({_type_name(annotations[field.name])})")
            lines.append(f"        {field.metadata.get('doc', '')}")
            continue
        lines.append(f"\n{full_name}: {field.metadata.get('doc', '')}")
        registry = field.metadata.get("registry")
        if registry is not None and _presets(registry):
            lines.append(f"  --{full_name}=NAME  (one of {', '.join(_presets(registry))})")
        lines.append(describe(value, full_name))
    return "\n".join(lines)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are raised as `ConfigError`."""

    def error(self, message: str) -> typing.NoReturn:
        """Raise `message`."""
        raise ConfigError(message)


def _collect(config: Config, override: str, changes: dict[str, Any]) -> None:
    """Put the parsed value of one override into the nested dictionary `changes`; a section's preset is under ""."""
    name, has_value, text = override.removeprefix("--").partition("=")
    require(
        override.startswith("--config."), f"unexpected argument {override!r}; settings are --config.section.field=value"
    )
    section: Any = config
    *parents, last = name.split(".")[1:]
    registry = None
    for depth, parent in enumerate(parents):
        registry = _metadata(type(section), parent).get("registry")
        section = _field(section, parent, ".".join(["config", *parents[:depth]]))
        require(dataclasses.is_dataclass(section), f"config.{'.'.join(parents[: depth + 1])} is not a section")
        changes = changes.setdefault(parent, {})
    holder = _holder(section, last, ".".join(["config", *parents]), registry)
    metadata = _metadata(holder, last)
    if dataclasses.is_dataclass(getattr(section, last, None)):
        changes.setdefault(last, {})[""] = _preset(metadata.get("registry"), text, name)
        return
    annotation = annotations_of(holder)[last]
    require(bool(has_value) or annotation is bool, f"{name} needs a value ({_type_name(annotation)}): --{name}=VALUE")
    changes[last] = _parse(text if has_value else "true", annotation, name)


def _holder(section: Any, key: str, name: str, registry: Any) -> Any:
    """The class of settings that has a field: the section's own, or that of another entry of its registry."""
    kinds = [type(section), *(registry[entry].settings for entry in registry or ())]
    found = next((kind for kind in kinds if key in {field.name for field in dataclasses.fields(kind)}), None)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    require(found is not None, f"unknown field {name}.{key}{_nearest(key, names)}")
    return found


def _presets(registry: Any) -> dict[str, dict[str, Any]]:
    return {
        preset: {registry.field: entry, **changes}
        for entry in registry
        for preset, changes in getattr(registry[entry], "presets", {}).items()
    }


def _field(section: Any, key: str, name: str) -> Any:
    names = [field.name for field in dataclasses.fields(section)]
    require(key in names, f"unknown field {name}.{key}{_nearest(key, names)}")
    return getattr(section, key)


def _nearest(key: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(key, list(names), n=1, cutoff=0.0)
    return f"; did you mean {found[0]}?" if found else ""


def _preset(registry: Any, text: str, name: str) -> dict[str, Any]:
    presets = {} if registry is None else _presets(registry)
    if not presets:
        raise ConfigError(f"{name} is a section: set its fields, --{name}.field=value")
    require(text in presets, f"{name} expects one of {', '.join(presets)}, but is {text!r}{_nearest(text, presets)}")
    return presets[text]


def _rebuild(section: Any, changes: dict[str, Any], name: str, registry: Any = None, default: Any = None) -> Any:
    """`section` with `changes`; single fields win over a preset."""
    changes = {**changes.pop("", {}), **changes}
    if registry is not None and changes.get(registry.field, getattr(section, registry.field)) != getattr(
        section, registry.field
    ):
        section = _switched(section, registry[changes[registry.field]].settings, registry.field, default)
    for key, value in changes.items():
        if isinstance(value, dict):
            of_key = _metadata(type(section), key).get("registry")
            start = _default(type(section), key) if of_key is not None else None
            changes[key] = _rebuild(getattr(section, key), value, f"{name}.{key}", of_key, start)
    return _build(lambda: dataclasses.replace(section, **changes), type(section), name) if changes else section


def _switched(section: Any, kind: Any, field: str, default: Any) -> Any:
    """Settings of another entry: the default section where that is one, else new ones; shared fields are kept."""
    start = default if type(default) is kind else kind()
    shared = {f.name for f in dataclasses.fields(kind)} & {f.name for f in dataclasses.fields(section)} - {field}
    return dataclasses.replace(start, **{name: getattr(section, name) for name in shared})


def _build(make: Callable[[], Any], kind: type, name: str) -> Any:
    """`make()`, with errors of the dataclass's own checks told by the field's full name."""
    try:
        return make()
    except ConfigError as error:
        message = str(error)
        first = re.match(r"\w*", message)
        starts_with_field = first is not None and first[0] in {field.name for field in dataclasses.fields(kind)}
        raise ConfigError(f"{name}.{message}" if starts_with_field else f"{name}: {message}") from error


def _parse(text: str, annotation: Any, name: str) -> Any:
    try:
        return _convert(text, annotation)
    except (ValueError, SyntaxError) as error:
        raise ConfigError(f"{name} expects {_type_name(annotation)}, but is {text!r}") from error


def _convert(text: str, annotation: Any) -> Any:
    """`text` as a value of the annotated type; raises ValueError or SyntaxError."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return {str(choice): choice for choice in arguments}[_one_of(text, arguments)]
    if origin in (typing.Union, types.UnionType):
        return _convert_union(text, arguments)
    if origin is tuple:
        return tuple(_convert(item, arguments[0]) for item in _items(text))
    if annotation is bool:
        return {"true": True, "false": False}[_one_of(text.lower(), ("true", "false"))]
    value = annotation(text)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not finite")
    return value


def _one_of(text: str, choices: Sequence[Any]) -> str:
    if text not in [str(choice) for choice in choices]:
        raise ValueError(text)
    return text


def _convert_union(text: str, members: Sequence[Any]) -> Any:
    if type(None) in members and text in ("None", "none"):
        return None
    for member in members:
        try:
            return _convert(text, member) if member is not type(None) else _fail(text)
        except (ValueError, SyntaxError):
            continue
    return _fail(text)


def _fail(text: str) -> typing.NoReturn:
    raise ValueError(text)


def _items(text: str) -> list[str]:
    """`a,b` or, for items with commas in them, `("a,b", "c")`."""
    if text[:1] in ("(", "["):
        return [str(item) for item in ast.literal_eval(text)]
    return [item.strip() for item in text.split(",") if item.strip()]


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("None" if member is type(None) else _type_name(member) for member in arguments)
    if origin is tuple:
        return f"{_type_name(arguments[0])}, several separated by commas"
    return _KINDS.get(annotation, str(annotation))


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
