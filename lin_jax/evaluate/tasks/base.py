"""What a task of `eval.py` is: its options, what it measures, and the name of its record."""

import abc
import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

_MOST = 2**24


class Outcome(NamedTuple):
    """What was measured: a text for people, a record for programs, and further texts, each with its own ending.

    A further text is written beside the record under the record's name with this ending instead.
    """

    text: str
    record: Mapping[str, Any]
    beside: Mapping[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a task on the command line.

    Attributes:
        names: its spellings, the first of which names it.
        help: a line about it.
        default: what it is where it is not given.
        how: further arguments of `argparse.ArgumentParser.add_argument`.
    """

    names: tuple[str, ...]
    help: str
    default: Any = None
    how: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def field(self) -> str:
        """The name of its value."""
        return self.names[0].removeprefix("--")


class EvaluationTask(abc.ABC):
    """A task of `eval.py`. A new one is a file with a subclass and a line in `lin_jax.evaluate.tasks.registry`.

    Attributes:
        record: the name of the file of its record, without ending.
        options: what it reads from the command line beside what all tasks read.
    """

    record: ClassVar[str]
    options: ClassVar[tuple[Option, ...]] = ()

    @classmethod  # noqa: B027 (most tasks refuse nothing)
    def check(cls, known: argparse.Namespace, overrides: Sequence[str]) -> None:  # noqa: B027 (most refuse nothing)
        """Raise `ConfigError` for options that are missing, or change nothing beside the rest.

        Args:
            known: the options that were given; others are not there.
            overrides: the settings `--config...` that were given.
        """

    @classmethod
    @abc.abstractmethod
    def measure(cls, known: argparse.Namespace, overrides: Sequence[str]) -> Outcome:
        """Measure what the options and settings say."""


def whole(least: int, most: int = _MOST) -> Callable[[str], int]:
    """Return a reader of whole numbers in a range."""

    def read(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must lie between {least} and {most}, but is {value}")
        return value

    read.__name__ = "whole number"  # argparse says "invalid whole number value"
    return read
