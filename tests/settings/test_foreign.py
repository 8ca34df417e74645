"""JSON of others: whatever it holds, a value of the type that was asked for, or one line that names file and field."""

import json
import math
import os
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lin_jax.settings.base import ConfigError
from lin_jax.settings.foreign import DEPTH, Fields, line_object, read_bytes, read_json, read_object

KINDS = [
    bool,
    int,
    float,
    str,
    list[str],
    list[list[int]],
    dict[str, float],
    dict[str, str],
    list[int] | None,
    str | list[str],
    Literal["a", "b"],
    dict,
    Any,
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(call, *told):
    with pytest.raises(ConfigError) as error:
        call()
    message = str(error.value)
    assert message.isprintable() and all(text in message for text in told), message
    return message


def belongs(value, kind):
    """Whether `value` is of a kind, by rules written without the reader's."""
    if kind is Any:
        return True
    if kind in (bool, str, dict):
        return type(value) is kind
    if kind is int:
        return type(value) is int and -(2**63) <= value < 2**63
    if kind is float:
        return type(value) is float or (type(value) is int and -(2**63) <= value < 2**63)
    if kind == Literal["a", "b"]:
        return value in ("a", "b")
    if kind == list[int] | None:
        return belongs(value, list[int])
    if kind == str | list[str]:
        return type(value) is str or belongs(value, list[str])
    member = kind.__args__[-1]
    items = value.values() if type(value) is dict else value
    return type(value) is kind.__origin__ and all(belongs(item, member) for item in items)


@given(VALUES, st.sampled_from(KINDS))
def test_a_value_of_the_kind_or_one_line_that_names_the_field(value, kind):
    fields = line_object(json.dumps({"name": value, "other": 1}), "in.jsonl, line 3")
    if value is None:
        refused(lambda: fields.get("name", kind), "in.jsonl, line 3: name is missing")
        assert fields.get("name", kind, "default") == "default" and "name" not in fields and len(fields) == 1
    elif belongs(value, kind):
        found = fields.get("name", kind)
        assert found == value and (kind is Any or belongs(found, kind)) and (kind is not float or type(found) is float)
    else:
        refused(lambda: fields.get("name", kind), "in.jsonl, line 3: name")


@given(st.binary() | st.text() | VALUES.map(json.dumps))
def test_any_content_is_read_as_the_library_reads_it_or_refused_in_a_line(content):
    try:
        found = line_object(content, "place")
    except ConfigError as error:
        assert str(error).startswith("place") and str(error).isprintable()
    else:
        assert found.values == json.loads(content)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, "64", 'hidden_size must be a whole number, but is "64"'),
        (int, 64.0, "hidden_size must be a whole number, but is 64.0"),
        (int, True, "hidden_size must be a whole number, but is true"),
        (int, 10**30, "hidden_size must lie between -2**63 and 2**63 - 1, but is 1000000"),
        (float, "1e-5", 'hidden_size must be a number, but is "1e-5"'),
        (float, 10**30, "hidden_size must lie between"),
        (bool, 1, "hidden_size must be true or false, but is 1"),
        (str, ["a"], "hidden_size must be text, but is ['a']"),
        (list[str], ["a", 3], "hidden_size[1] must be text, but is 3"),
        (list[list[int]], [[1], [0, "x\n"]], r'hidden_size[1][1] must be a whole number, but is "x\n"'),
        (list[int], {"a": 1}, "hidden_size must be a list of whole numbers, but is {'a': 1}"),
        (dict[str, float], {"q": "8"}, 'hidden_size.q must be a number, but is "8"'),
        (dict[str, float], [], "hidden_size must be an object of numbers, but is []"),
        (str | list[str], 3, "hidden_size must be text or a list of texts, but is 3"),
        (str | list[str], ["a", 3], "hidden_size[1] must be text, but is 3"),
        (Literal["lora", "none"], "all", 'hidden_size must be one of lora, none, but is "all"'),
    ],
)
def test_messages(tmp_path, kind, value, message):
    file = write(tmp_path / "config.json", json.dumps({"hidden_size": value}))
    assert refused(lambda: read_object(file).get("hidden_size", kind)).startswith(f"{file}: {message}")


def test_fields_and_sections(tmp_path):
    values = {"a": 1, "none": None, "rope": {"factor": 8, "kind": "x"}, "list": [1]}
    fields = read_object(write(tmp_path / "config.json", "\ufeff" + json.dumps(values)))
    assert fields.values == values and list(fields) == ["a", "rope", "list"]
    factor = fields.section("rope").get("factor", float)
    assert factor == 8.0 and type(factor) is float
    assert len(fields.section("absent")) == len(fields.section("none")) == 0
    assert fields.section("absent").get("factor", float, 1.0) == 1.0 and fields.get("a", int, None) == 1
    refused(lambda: fields.section("absent").get("factor", float), f"{tmp_path}/config.json: absent.factor is missing")
    refused(lambda: fields.section("rope").get("kind", int), 'rope.kind must be a whole number, but is "x"')
    refused(lambda: fields.section("list"), "config.json: list must be an object, but is [1]")
    refused(lambda: fields.section("rope").require(False, "kind must be y"), "config.json: rope.kind must be y")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[1]", "the content must be an object, but is [1]"),
        ("null", "the content must be an object, but is None"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "is too large"),
        ('{"a": 1, "a": 2}', 'the name "a" stands twice, with different values'),
        ('{"b": {"a": 1, "a": true}}', 'the name "a" stands twice'),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\udfff": 1}', "half of a surrogate pair"),
        ('{"a": ["\\u0000"]}', "a NUL character"),
        (b'{"a": "\xff"}', "is not UTF-8: invalid start byte at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        ("[" * 100_000, f"nested more than {DEPTH} deep"),
        ('{"a": ' * 1000 + "1" + "}" * 1000, f"nested more than {DEPTH} deep"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), f"nested more than {DEPTH} deep"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_content_that_is_refused(tmp_path, content, message):
    file = write(tmp_path / "config.json", content)
    assert str(file) in refused(lambda: read_object(file), message)


def test_what_lies_on_a_border_is_taken(tmp_path):
    nested = "[" * DEPTH + "]" * DEPTH
    assert read_json(write(tmp_path / "a.json", nested)) == json.loads(nested)
    assert read_object(write(tmp_path / "b.json", '{"a": [1, 2], "a": [1, 2]}')).values == {"a": [1, 2]}
    assert line_object(b'{"prompt": "\\u0000\\ud83d\\ude00"}', "line 1").get("prompt", str) == "\0\U0001f600"
    assert read_json(tmp_path / "a.json", limit=len(nested)) == json.loads(nested)
    refused(lambda: read_json(tmp_path / "a.json", limit=len(nested) - 1), "is too large: more than")


@pytest.mark.parametrize("name", ["absent", "pipe", "directory", "loop", "dangling", "in\0valid", "x" * 300, "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "device").symlink_to("/dev/zero")
    refused(lambda: read_bytes(tmp_path / name), str(tmp_path))
    refused(lambda: read_object(tmp_path / name), str(tmp_path))


def test_a_link_to_a_file_is_followed(tmp_path):
    write(tmp_path / "blob", '{"a": 0.5}')
    (tmp_path / "config.json").symlink_to(tmp_path / "blob")
    assert math.isclose(read_object(tmp_path / "config.json").get("a", float), 0.5)
    assert isinstance(read_object(str(tmp_path / "config.json")), Fields)
