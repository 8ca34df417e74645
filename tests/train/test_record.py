"""The record of a run's starts, whatever a file of its name holds."""

import json

import hypothesis
import pytest
from hypothesis import strategies

from lin_jax.experiment import Config
from lin_jax.train.record import RECORD, write_run_record

JSON = strategies.recursive(
    strategies.none() | strategies.integers() | strategies.text(),
    lambda inner: strategies.lists(inner) | strategies.dictionaries(strategies.sampled_from(["starts", "a"]), inner),
    max_leaves=5,
)


def starts_of(directory):
    return json.loads((directory / RECORD).read_text())["starts"]


def test_every_start_is_kept_and_a_new_run_begins_anew(tmp_path):
    for step in (0, 4, 9):
        write_run_record(tmp_path, Config(workdir="w"), step, 7)
    assert [start["step"] for start in starts_of(tmp_path)] == [0, 4, 9]
    write_run_record(tmp_path, Config(workdir="w"), 0, 7)
    assert [start["step"] for start in starts_of(tmp_path)] == [0]


@hypothesis.settings(max_examples=40)
@hypothesis.given(JSON)
@hypothesis.example({"starts": 3})
@hypothesis.example({"starts": "ab"})
@hypothesis.example([])
def test_other_json_in_its_place_is_begun_anew(tmp_path_factory, values):
    directory = tmp_path_factory.mktemp("record")
    (directory / RECORD).write_text(json.dumps(values))
    write_run_record(directory, Config(workdir="w"), 4, 7)
    earlier = values.get("starts") if isinstance(values, dict) else None
    found = starts_of(directory)
    assert found[:-1] == (earlier if isinstance(earlier, list) else []) and found[-1]["step"] == 4


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"more"])
def test_a_damaged_record_is_begun_anew(tmp_path, content):
    (tmp_path / RECORD).write_bytes(content)
    write_run_record(tmp_path, Config(workdir="w"), 4, 7)
    assert [start["step"] for start in starts_of(tmp_path)] == [4]
