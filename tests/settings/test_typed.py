"""Settings check the types and sizes of their fields when they are made."""

import dataclasses
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest

from lin_jax.settings.base import ConfigError, require, section, setting
from lin_jax.settings.typed import LARGEST, Settings, fit, shown, type_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Settings):
    """A section."""

    size: int = setting(1, "a size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Settings):
    """All types of fields."""

    flag: bool = setting(False, "a bool")
    count: int = setting(1, "an int", most=100)
    plain: int = setting(1, "an int without bound")
    rate: float = setting(1.0, "a float", most=10)
    name: str = setting("a", "a str")
    choice: Literal["a", "b"] = setting("a", "a literal")
    names: tuple[str, ...] = setting((), "texts")
    counts: tuple[int, ...] = setting((), "ints", most=100)
    maybe: int | None = setting(None, "an int or None")
    inner: Inner = section(Inner, "a section")

    def _check(self) -> None:
        require(self.count != 13, f"count must not be {self.count}")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rate", 3, 3.0),
        ("rate", np.float32(0.5), 0.5),
        ("rate", np.int64(3), 3.0),
        ("rate", ml_dtypes.bfloat16(1), 1.0),
        ("count", np.int32(3), 3),
        ("flag", np.bool_(True), True),
        ("name", np.str_("b"), "b"),
        ("names", ["x", np.str_("y")], ("x", "y")),
        ("counts", [1, 2], (1, 2)),
        ("plain", LARGEST, LARGEST),
        ("plain", -LARGEST, -LARGEST),
        ("count", 100, 100),
        ("rate", 10, 10.0),
        ("maybe", None, None),
        ("inner", Inner(size=3), Inner(size=3)),
    ],
)
def test_a_value_becomes_one_of_python_of_the_annotated_type(name, value, expected):
    found = getattr(Outer(**{name: value}), name)
    assert found == expected and type(found) is type(expected)
    assert [type(item) for item in found] == [type(item) for item in expected] if isinstance(found, tuple) else True


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("flag", 1, "flag must be true or false, but is 1"),
        ("flag", "true", 'flag must be true or false, but is "true"'),
        ("count", True, "count must be a whole number, but is true"),
        ("count", 3.0, "count must be a whole number, but is 3.0"),
        ("count", None, "count must be a whole number, but is None"),
        ("count", 101, "count must be at most 100, but is 101"),
        ("count", -(2**40), "count must be at least -2147483647, but is -1099511627776"),
        ("count", 13, "count must not be 13"),
        ("plain", LARGEST + 1, "plain must be at most 2147483647, but is 2147483648"),
        ("plain", 10**5000, "plain must lie between -2**63 and 2**63 - 1, but is a very large int"),
        ("rate", "1", 'rate must be a number, but is "1"'),
        ("rate", True, "rate must be a number, but is true"),
        ("rate", float("nan"), "rate must be a finite number, but is nan"),
        ("rate", np.float64("inf"), "rate must be a finite number, but is inf"),
        ("rate", 1j, "rate must be a number, but is 1j"),
        ("rate", np.ones(()), "rate must be a number, but is array(1.)"),
        ("rate", 10.5, "rate must be at most 10, but is 10.5"),
        ("name", b"x", "name must be text, but is b'x'"),
        ("name", "\udc80", "name holds half of a surrogate pair, which is no text"),
        ("choice", "c", 'choice must be one of a, b, but is "c"'),
        ("choice", ["a"], "choice must be one of a, b, but is ['a']"),
        ("names", "xy", 'names must be a list of texts, but is "xy"'),
        ("names", {"x"}, "names must be a list of texts, but is {'x'}"),
        ("names", ("x", 3), "names[1] must be text, but is 3"),
        ("counts", (1, 101), "counts[1] must be at most 100, but is 101"),
        ("maybe", "3", 'maybe must be a whole number or None, but is "3"'),
        ("maybe", 2**40, "maybe must be at most 2147483647"),
        ("inner", {"size": 3}, "inner must be Inner, but is {'size': 3}"),
        ("inner", None, "inner must be Inner, but is None"),
        ("inner", Inner, "inner must be Inner, but is <class"),
    ],
    ids=lambda value: shown(value)[:40],
)
def test_a_wrong_value_is_named(name, value, message):
    with pytest.raises(ConfigError) as error:
        Outer(**{name: value})
    assert str(error.value).startswith(message) and str(error.value).isprintable()


class Odd:
    def __repr__(self):
        raise RuntimeError


def test_any_object_is_shown():
    assert shown(Odd()) == "a Odd" and len(shown("x" * 1000)) < 100 and shown(True) == "true"
    with pytest.raises(ConfigError, match="name must be text, but is a Odd"):
        Outer(name=Odd())


def test_types_have_names():
    assert type_name(list[list[int]]) == "a list of lists of whole numbers"
    assert type_name(dict[str, float] | None) == "an object of numbers or None"
    assert fit({"a": [1]}, dict[str, list[float]], "x") == {"a": [1.0]} and fit([None], Any, "x") == [None]
