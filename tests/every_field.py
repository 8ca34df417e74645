"""Every field of every section that `Config` can hold, and values of every type for each."""

import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from lin_jax.experiment import (
    AugmentedConfig,
    BertConfig,
    Config,
    ConfigError,
    DataConfig,
    FinetuneConfig,
    Gpt2Config,
    LlamaConfig,
    T5Config,
)
from lin_jax.settings.command_line import apply_overrides
from lin_jax.settings.typed import annotations_of, shown


class Case(NamedTuple):
    """A value for a field of a section, the section's class, and settings in which it is one of that class."""

    kind: type
    section: str
    config: Config
    field: str
    annotation: Any
    value: Any

    @property
    def name(self) -> str:
        return f"{self.section}.{self.field}"

    def __str__(self) -> str:
        return f"{self.kind.__name__}.{self.field}={shown(self.value)}"


VALUES = [
    *(None, True, False, "8", "", "nonsense", "\ud800", "\0", b"x", object(), Config, Ellipsis, 1j),
    *(-1, 0, 8, 10**12, 10**18, 10**30, -(10**30), 10**5000, 64.0, -0.5, math.nan, math.inf, -math.inf, 1e308),
    *([], (), {}, {"a": 1}, [[[]]], [None], ["x", 8], [8, "x"], {8}, np.zeros(2), np.float64("nan")),
]
TEXTS = [
    *("None", "True", "8", "", "nonsense", "\ud800", "b'x'", "1j", "-1", "0", "10_0", "0x10", "1" * 13, "1" * 31),
    *("1" * 5000, "64.0", "-0.5", "nan", "-inf", "1e308", "1e999", "[]", "()", "{}", "[[[]]]", "[None]", "(8, 'x')"),
    *("x,8", "(", "[" * 1000, "(8)", "x" * 1000, "two\nlines"),
]


def sections(
    kind: Any = Config, name: str = "config", chosen: tuple[str, ...] = ()
) -> Iterator[tuple[Any, str, tuple[str, ...]]]:
    """Yield each class of settings with its place and the variants that put it there."""
    yield kind, name, chosen
    for field in dataclasses.fields(kind):
        inner, registry = f"{name}.{field.name}", field.metadata.get("registry")
        if registry is not None:
            for variant in registry:
                yield from sections(
                    registry[variant].settings, inner, (*chosen, f"--{inner}.{registry.field}={variant}")
                )
        elif dataclasses.is_dataclass(annotations_of(kind)[field.name]):
            yield from sections(annotations_of(kind)[field.name], inner, chosen)


# Some tasks need a model to start from, and linearized attention in it.
FINETUNED = Config(
    model=LlamaConfig(attention=AugmentedConfig()), finetune=FinetuneConfig(checkpoint="x", train=("attention",))
)
# One needs examples with labels, and a model that has a head for them.
LABELLED = Config(model=Gpt2Config(), data=DataConfig(source="glue"))
# Models of whole texts have other attention, and read short rows.
WHOLE = Config(model=BertConfig(), data=DataConfig(sequence_length=512))
# And one pairs of texts, and a model that reads one of them.
PAIRS = Config(model=T5Config(), data=DataConfig(source="table", path=("x",), target_field="x"))


def possible() -> dict[Any, tuple[str, Config]]:
    """Return each class of settings with the first place where it may stand, and settings in which it stands there."""
    found: dict[Any, tuple[str, Config]] = {}
    for start in (Config(), FINETUNED, LABELLED, WHOLE, PAIRS):
        for kind, section, chosen in sections():
            with contextlib.suppress(ConfigError):  # Not every model takes every attention.
                found.setdefault(kind, (section, apply_overrides(start, chosen)))
    return found


PLACES = possible()


def cases(values: list[Any]) -> Iterator[Case]:
    """Yield every field of every class with every value."""
    for kind, (section, config) in PLACES.items():
        for name, annotation in annotations_of(kind).items():
            for value in values:
                yield Case(kind, section, config, name, annotation, value)


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a value is of an annotated type, by rules that are not those of the settings' own reader."""
    arguments = typing.get_args(annotation)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return any(fits(value, member) for member in arguments)
    if typing.get_origin(annotation) is Literal:
        return isinstance(value, str) and value in arguments
    if typing.get_origin(annotation) is tuple:
        return isinstance(value, list | tuple) and all(fits(item, arguments[0]) for item in value)
    if annotation is float:
        return type(value) in (int, float) and abs(value) < 1e309 and value == value
    if annotation is str:
        return type(value) is str and not any(0xD800 <= ord(character) <= 0xDFFF for character in value)
    if annotation is int:
        return type(value) is int and abs(value) < 2**63
    if annotation in (bool, type(None)):
        return type(value) is annotation
    return isinstance(value, annotation)


def reads(text: str, annotation: Any) -> bool:
    """Return whether a text on the command line can mean a value of an annotated type."""
    arguments = typing.get_args(annotation)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return text in ("None", "none") or any(reads(text, member) for member in arguments if member is not type(None))
    if typing.get_origin(annotation) is Literal:
        return text in arguments
    if typing.get_origin(annotation) is tuple:
        items = text.strip("()[]").replace("'", "").split(",") if text.strip("()[]") else []
        plain = not re.search(r"[\[(]", text) or re.fullmatch(r"[\[(]('?\w+'?,? ?)*[\])]", text) is not None
        return plain and all(reads(item.strip(), arguments[0]) for item in items) and text != "(8)"
    if annotation is float:
        return re.fullmatch(r"-?[\d_]+(\.\d+)?(e\d{1,3})?", text) is not None and abs(float(text)) < 1e309
    if annotation is int:
        return re.fullmatch(r"-?\d[\d_]*", text) is not None and len(text) < 19
    if annotation is bool:
        return text.lower() in ("true", "false")
    return annotation is str and not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


CASES = list(cases(VALUES))
