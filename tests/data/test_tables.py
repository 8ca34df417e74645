"""Tables: what is read from files, and what is refused in one line."""

import gzip

import pytest

from lin_jax.data.tables import read_table
from lin_jax.settings.base import ConfigError


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_tsv_has_no_quotes_and_may_begin_with_a_mark(tmp_path):
    text = '\ufefflabel\ttext\r\n1\tsaid "so\r\n0\tline\u2028here, "and\r\n'
    for name, content in (("a.tsv", text.encode()), ("a.tsv.gz", gzip.compress(text.encode()))):
        table = read_table(write(tmp_path / name, content), str(tmp_path / "cache"))
        assert table.columns == {"label": ("1", "0"), "text": ('said "so', 'line\u2028here, "and')}
        assert table.lines == [2, 3]


def test_csv_quotes_and_jsonl_holds_values(tmp_path):
    table = read_table(write(tmp_path / "a.csv", 'x,y\n"1,\n2","say ""a"""\n\n3,4\n'), "")
    assert table.columns == {"x": ("1,\n2", "3"), "y": ('say "a"', "4")} and table.lines == [2, 5]
    table = read_table(write(tmp_path / "a.jsonl", '{"a": "x"}\n\n{"a": "y", "b": 2}\n'), "")
    assert table.columns == {"a": ["x", "y"], "b": [None, 2]} and table.lines == [1, 3]


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "a.tsv", "x\n1\n")
    assert read_table(path, "").columns == {"x": ("1",)}
    assert read_table(write(tmp_path / "a.tsv", "x\n1\n22\n"), "").columns == {"x": ("1", "22")}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "x\ty\n1\t2\n1\n", "a.tsv line 3: 1 columns, where 2 are due (x, y)"),
        ("a.tsv", "x\tx\n1\t2\n", "a.tsv line 1: two columns are called x"),
        ("a.tsv", b"x\n1\n\xff\n", "a.tsv line 3: not UTF-8"),
        ("a.tsv", "x\n1\n\0\n", "a.tsv line 3: holds a NUL character"),
        ("a.csv", 'x\n"1\n2\n', "a.csv line 2: unexpected end of data"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl line 2"),
        ("a.xls", "x", "unknown suffix"),
        (None, "", "does not exist"),
    ],
)
def test_damaged_tables_are_refused_with_their_line(tmp_path, name, text, message):
    path = write(tmp_path / name, text) if name else str(tmp_path / "none.tsv")
    with pytest.raises(ConfigError) as error:
        read_table(path, "")
    assert message in str(error.value)
