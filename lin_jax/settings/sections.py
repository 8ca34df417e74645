"""What the command line and saved settings share: the fields of a section, its variants and presets, how it is made."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lin_jax.settings.base import ConfigError, require
from lin_jax.settings.registry import Registry
from lin_jax.settings.typed import shown


def registry_of(field: Any) -> Registry[Any] | None:
    """Return the table of what a field made by `variants` can be; None for other fields."""
    return field.metadata.get("registry")


def find_field(kind: Any, key: str, name: str) -> Any:
    """Return a field of the section `name`, which is a `kind`; raise `ConfigError` where it has none of this name."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if key not in fields:
        raise ConfigError(f"unknown field {name}.{key}{nearest(key, fields)}")
    return fields[key]


def default_of(field: Any) -> Any:
    """Return a field's default; None where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def nearest(key: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the known one that is most like it."""
    found = difflib.get_close_matches(key, list(names), n=1, cutoff=0.0)
    return f"; did you mean {found[0]}?" if found else ""


def settings_of(registry: Registry[Any], variant: Any, name: str) -> Any:
    """Return the class of settings of an entry, for the section `name`; raise `ConfigError` where there is none."""
    require(
        isinstance(variant, str),
        f"{name}.{registry.field} must be one of {', '.join(registry)}, but is {shown(variant)}",
    )
    try:
        return registry[variant].settings
    except ConfigError as error:
        raise ConfigError(f"{name}.{registry.field}: {error}") from error


def presets_of(registry: Registry[Any]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Return names of whole sections, each with its variant and what it sets; a variant's own name sets nothing."""
    own: dict[str, tuple[str, Mapping[str, Any]]] = {variant: (variant, {}) for variant in registry}
    presets = {
        preset: (variant, values)
        for variant in registry
        for preset, values in getattr(registry[variant], "presets", {}).items()
    }
    return own | presets


def make_section(kind: Any, values: Mapping[str, Any], name: str) -> Any:
    """Return a section with these values; errors of its own checks are told by the field's full name."""
    try:
        return kind(**values)
    except ConfigError as error:
        message = str(error)
        first = re.match(r"\w*", message)
        starts_with_field = first is not None and first[0] in {field.name for field in dataclasses.fields(kind)}
        raise ConfigError(f"{name}.{message}" if starts_with_field else f"{name}: {message}") from error
    except TypeError as error:  # a field without default
        raise ConfigError(f"{name}: {error}") from error
