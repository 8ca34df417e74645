"""Lines of JSONL: what ends one, what is none of the text, and what is refused."""

import codecs
import json

import hypothesis
import hypothesis.strategies as st
import pytest

from lin_jax.data.lines import read_lines
from lin_jax.settings.base import ConfigError

# Everything that Python's splitlines takes for a line's end, among other text.
texts = st.text(st.one_of(st.sampled_from("\v\f\r\x1c\x1d\x1e\x85\u2028\u2029\ufeff"), st.characters(codec="utf-8")))


@hypothesis.given(values=st.lists(texts, min_size=1), end=st.sampled_from(["\n", "\r\n"]), mark=st.booleans())
def test_lines_are_what_line_feeds_end(tmp_path_factory, values, end, mark):
    file = tmp_path_factory.getbasetemp() / "lines.jsonl"
    lines = [json.dumps({"a": value}, ensure_ascii=False) for value in values]
    file.write_bytes(codecs.BOM_UTF8 * mark + "".join(f"{line}{end}{end}" for line in lines).encode())
    found = read_lines(file)
    assert [line.get("a", str) for line in found.values()] == values
    assert list(found) == list(range(1, 2 * len(values) + 1, 2))


@pytest.mark.parametrize("line", ["[1]", "1", "null", "{", '{"a": NaN}', "[" * 1000 + "]" * 1000, '{"a": "\\udc00"}'])
def test_what_is_no_object_is_refused_by_its_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n' + line)
    with pytest.raises(ConfigError, match="a.jsonl, line 3") as error:
        read_lines(tmp_path / "a.jsonl")
    assert "\n" not in str(error.value)
