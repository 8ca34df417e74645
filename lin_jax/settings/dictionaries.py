"""Settings as plain dictionaries, in which they are saved."""

import dataclasses
import json
from typing import Any

from lin_jax.settings.base import require
from lin_jax.settings.registry import Registry
from lin_jax.settings.sections import default_of, find_field, make_section, registry_of, settings_of
from lin_jax.settings.typed import annotations_of, shown


def section_to_dict(config: Any) -> dict[str, Any]:
    """Return a section's settings as nested dictionaries that JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def section_from_dict(values: Any, kind: Any, name: str = "config", variant: str | None = None) -> Any:
    """Return the section that `section_to_dict` made these values from; fields that are not there have their defaults.

    Args:
        values: a dictionary, also one that an earlier version saved, see `Settings.former`.
        kind: the section's class, or the `Registry` of what it can be.
        name: of the section, in messages.
        variant: the entry of the registry where `values` does not name one.

    Raises:
        ConfigError: a field does not exist, or its value does not suit it.
    """
    require(isinstance(values, dict), f"{name} must be an object of settings, but is {shown(values)}")
    if isinstance(kind, Registry):
        variant = values.get(kind.field, variant)
        return section_from_dict(values, settings_of(kind, variant, name), name)
    fields = {}
    for key, value in values.items():
        present = _present_name(kind, key)
        if present is not None and (present == key or present not in values):
            fields[present] = _value(kind, present, value, name)
    return make_section(kind, fields, name)


def _present_name(kind: Any, key: str) -> str | None:
    """Return what a field is called now; None for one of which nothing is left."""
    known = key in {field.name for field in dataclasses.fields(kind)}
    return key if known else getattr(kind, "former", {}).get(key, key)


def _value(kind: Any, key: str, value: Any, name: str) -> Any:
    field, annotation = find_field(kind, key, name), annotations_of(kind).get(key)
    registry = registry_of(field)
    if registry is not None:
        return section_from_dict(value, registry, f"{name}.{key}", getattr(default_of(field), registry.field, None))
    if dataclasses.is_dataclass(annotation):
        return section_from_dict(value, annotation, f"{name}.{key}")
    return value
