"""Settings on the command line: `--config.optimizer.peak_learning_rate=1e-4 --config.model.attention.kind=softmax`.

All that is given is collected first and every section is then made once, so the order does not matter and only the
final settings have to agree with each other.
"""

import argparse
import ast
import contextlib
import dataclasses
import inspect
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from lin_jax.settings.base import ConfigError, require
from lin_jax.settings.registry import Registry
from lin_jax.settings.sections import (
    default_of,
    find_field,
    make_section,
    nearest,
    presets_of,
    registry_of,
    settings_of,
)
from lin_jax.settings.typed import annotations_of, shown, type_name

Section = TypeVar("Section")
_PREFIX = "--config."


@dataclasses.dataclass
class _Given:
    """What a command line gives for a field, without a value None, and for the fields in it."""

    texts: list[str | None] = dataclasses.field(default_factory=list)
    fields: dict[str, "_Given"] = dataclasses.field(default_factory=dict)


def apply_overrides(config: Section, overrides: Sequence[str]) -> Section:
    """Return a copy of a section with what the command line gives.

    Args:
        config: the settings before.
        overrides: `--config.section.field=value`; a bool may be given as `--config.field` alone. Where a section can
            be one of several (`variants`), its field that says which, or the name of a preset in the section's place,
            puts another there; it keeps the values of the fields that both have.

    Raises:
        ConfigError: there is no such field, or a value does not suit it.
    """
    given = _Given()
    for override in overrides:
        require(
            override.startswith(_PREFIX), f"unexpected argument {override!r}; settings are {_PREFIX}section.field=value"
        )
        path, has_value, text = override.removeprefix(_PREFIX).partition("=")
        place = given
        for key in path.split("."):
            place = place.fields.setdefault(key, _Given())
        place.texts.append(text if has_value else None)
    return _changed(type(config), _values(config), given.fields, "config")


def _values(section: Any) -> dict[str, Any]:
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}


def _changed(kind: Any, values: dict[str, Any], given: dict[str, _Given], name: str) -> Any:
    """Return the section of a kind with these values, but for the fields that are given."""
    for key, inner in given.items():
        field = find_field(kind, key, name)
        old = values[key] if key in values else default_of(field)
        values[key] = _value(field, annotations_of(kind)[key], old, inner, f"{name}.{key}")
    return make_section(kind, values, name)


def _value(field: Any, annotation: Any, old: Any, given: _Given, name: str) -> Any:
    registry = registry_of(field)
    if registry is not None:
        return _variant(registry, old, default_of(field), given, name)
    if dataclasses.is_dataclass(old):
        require(not given.texts, f"{name} is a section: set its fields, --{name}.field=value")
        return _changed(type(old), _values(old), given.fields, name)
    return _parse(_text(given, annotation, name), annotation, name)


def _text(given: _Given, annotation: Any, name: str) -> str:
    """Return the text that is given for a field that is no section; it was given last."""
    require(not given.fields, f"{name} is not a section")
    text = given.texts[-1]
    if text is not None:
        return text
    require(annotation is bool, f"{name} needs a value ({type_name(annotation)}): --{name}=VALUE")
    return "true"


def _variant(registry: Registry[Any], old: Any, default: Any, given: _Given, name: str) -> Any:
    """Return a section that is one of several, with what is given; what both have is kept where it becomes another."""
    variant: str = getattr(old, registry.field)
    preset: dict[str, Any] = {}
    if given.texts:
        variant, preset = _preset(registry, given.texts[-1], name)
    if registry.field in given.fields:
        before, variant = variant, _text(given.fields[registry.field], str, f"{name}.{registry.field}")
        told = f"{name} names one with {registry.field}={before}, but {name}.{registry.field} is {variant}"
        require(not given.texts or variant == before, told)
    kind = settings_of(registry, variant, name)
    fields = {key: inner for key, inner in given.fields.items() if key != registry.field}
    _require_fields(registry, kind, variant, fields, name)
    values = _values(old) if variant == getattr(old, registry.field) else _switched(kind, old, default)
    return _changed(kind, {**values, registry.field: variant, **preset}, fields, name)


def _switched(kind: Any, old: Any, default: Any) -> dict[str, Any]:
    """Return the values with which a section becomes another kind: its own where it has the field, else the default."""
    known = {field.name for field in dataclasses.fields(kind)}
    own = {key: value for key, value in _values(old).items() if key in known}
    return {**(_values(default) if type(default) is kind else {}), **own}


def _preset(registry: Registry[Any], text: str | None, name: str) -> tuple[str, dict[str, Any]]:
    presets = presets_of(registry)
    known = f"one of {', '.join(presets)}"
    if text is None:
        raise ConfigError(f"{name} needs a value ({known}), or set its fields: --{name}.field=value")
    if text not in presets:
        raise ConfigError(f"{name} must be {known}, but is {shown(text)}{nearest(text, presets)}")
    variant, values = presets[text]
    return variant, dict(values)


def _require_fields(registry: Registry[Any], kind: Any, variant: str, given: dict[str, _Given], name: str) -> None:
    """Raise `ConfigError` for a field that only other variants have."""
    for key in given.keys() - {field.name for field in dataclasses.fields(kind)}:
        owners = [other for other in registry if key in annotations_of(registry[other].settings)]
        there = f"{registry.field}={' or '.join(owners)}"
        require(not owners, f"{name}.{key} is a setting of {there}, but {name}.{registry.field} is {variant}")


def describe(config: Any, name: str = "config") -> str:
    """Return one paragraph a setting: its full name, value, type and documentation; of variants, those of each."""
    return "\n".join(_described(config, name, "", []))


def _described(section: Any, name: str, left_out: str, told: list[Registry[Any]]) -> Iterator[str]:
    for field in dataclasses.fields(section):
        value, full_name, doc = getattr(section, field.name), f"{name}.{field.name}", field.metadata.get("doc", "")
        registry = registry_of(field)
        if registry is not None:
            yield f"\n{full_name}: {doc}"
            yield from _described_variants(registry, value, full_name, told)
        elif dataclasses.is_dataclass(value):
            yield f"\n{full_name}: {doc}"
            yield from _described(value, full_name, "", told)
        elif field.name != left_out:
            yield f"  --{full_name}={_show(value)}  ({type_name(annotations_of(type(section))[field.name])})"
            yield f"        {doc}"


def _described_variants(registry: Registry[Any], default: Any, name: str, told: list[Registry[Any]]) -> Iterator[str]:
    own = getattr(default, registry.field)
    yield f"  --{name}.{registry.field}={own}  (one of {', '.join(registry)})"
    yield f"  --{name}=NAME  (one of {', '.join(presets_of(registry))})"
    if registry in told:
        yield "        the settings of each are those above"
        return
    told.append(registry)
    for variant in registry:
        section = default if variant == own else registry[variant].settings(**{registry.field: variant})
        yield f"\n{name}, where {registry.field}={variant}: {(inspect.getdoc(type(section)) or '').splitlines()[0]}"
        yield from _described(section, name, registry.field, told)


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are raised as `ConfigError`, an unknown option with the known one that is most like it."""

    def __init__(self, description: str | None, **options: Any):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return what is given for the parser's arguments; raise `ConfigError` for others."""
        known, others = self.parse_known_args(args, namespace)
        self._refuse(others)
        return known

    def parse_with_settings(self, args: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """Return what is given for the parser's arguments, and for settings; raise `ConfigError` for others."""
        known, others = self.parse_known_args(args)
        self._refuse(text for text in others if not text.startswith(_PREFIX))
        return known, others

    def error(self, message: str) -> typing.NoReturn:
        """Raise `message`."""
        raise ConfigError(message)

    def _refuse(self, arguments: Iterable[str]) -> None:
        for argument in arguments:
            option = argument.partition("=")[0]
            told = nearest(option, self._option_string_actions) if option.startswith("-") else ""
            raise ConfigError(f"unexpected argument {shown(argument)}{told}")


def _parse(text: str, annotation: Any, name: str) -> Any:
    try:
        return _convert(text, annotation)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{name} must be {type_name(annotation)}, but is {shown(text)}") from error


def _convert(text: str, annotation: Any) -> Any:
    """Return `text` as a value of the annotated type; raise ValueError or SyntaxError."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return {str(choice): choice for choice in arguments}[_one_of(text, arguments)]
    if origin in (typing.Union, types.UnionType):
        return _convert_union(text, arguments)
    if origin is tuple:
        return tuple(_convert(item, arguments[0]) for item in _items(text))
    if annotation is bool:
        return {"true": True, "false": False}[_one_of(text.lower(), ("true", "false"))]
    return annotation(text)


def _one_of(text: str, choices: Sequence[Any]) -> str:
    if text not in [str(choice) for choice in choices]:
        raise ValueError(text)
    return text


def _convert_union(text: str, members: Sequence[Any]) -> Any:
    if type(None) in members and text in ("None", "none"):
        return None
    for member in members:
        with contextlib.suppress(ValueError, SyntaxError):
            if member is not type(None):
                return _convert(text, member)
    raise ValueError(text)


def _items(text: str) -> list[str]:
    """Return the parts of `a,b` or, for items with commas in them, of `("a,b", "c")`."""
    if text[:1] in ("(", "["):
        return [_item(item) for item in ast.literal_eval(text)]
    return [item.strip() for item in text.split(",") if item.strip()]


def _item(value: Any) -> str:
    if not isinstance(value, (str, int, float)):
        raise ValueError(value)
    return str(value)
