"""Sources: every document once, in one of the two splits, whatever the form of the files."""

import glob
import gzip
import json
import os
import re
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lin_jax.data import index as index_module
from lin_jax.data import sources
from lin_jax.data.files import text_files
from lin_jax.data.holdout import held_out
from lin_jax.data.sources import open_source
from lin_jax.experiment import ConfigError, DataConfig

STORIES = [f"Story {number}: a cat é sat.\nThen it left 猫.\n" for number in range(40)]


def read(config, split):
    source = open_source(config, split)
    return [source[index] for index in range(len(source))]


def documents(config, split):
    """Whole documents, put together from their pieces."""
    source, found, text = open_source(config, split), [], ""
    for index in range(len(source)):
        text += source[index]
        if source.ends(index):
            found.append(text)
            text = ""
    assert text == ""
    return found


def config_of(tmp_path, name, data, **settings):
    (tmp_path / name).write_bytes(data)
    settings = {"cache_directory": str(tmp_path / "cache"), **settings}
    return DataConfig(source="text", path=(str(tmp_path / name),), **settings)


@given(st.integers(2, 2000), st.floats(0.001, 0.999))
def test_held_out_documents_are_spread_evenly(number, fraction):
    mask = held_out(number, fraction)
    assert 0 < mask.sum() < number
    assert abs(mask.sum() - number * fraction) <= 1
    gaps = np.diff(np.flatnonzero(mask))
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def plain(stories):
    return "<|endoftext|>".join(stories).encode()


def lines(stories):
    return "\n".join(json.dumps({"text": story}) for story in stories).encode()


@pytest.mark.parametrize(
    ("name", "data", "separator"),
    [
        ("a.txt", plain(STORIES), "<|endoftext|>"),
        ("a", plain(STORIES) + b"<|endoftext|>", "<|endoftext|>"),
        ("a.txt", b"\xef\xbb\xbf" + plain(["", *STORIES, " \n"]), "<|endoftext|>"),
        ("a.jsonl", lines(STORIES), None),
        ("a.jsonl", b"\n" + lines(["", *STORIES]) + b"\n\n", None),
        ("a.txt.gz", gzip.compress(plain(STORIES)[:99]) + gzip.compress(plain(STORIES)[99:]), "<|endoftext|>"),
        ("a.jsonl.gz", gzip.compress(lines(STORIES)), None),
        ("a.JSONL.zst", zstandard.compress(lines(STORIES[:9]) + b"\n") + zstandard.compress(lines(STORIES[9:])), None),
        ("a.zst", zstandard.compress(plain(STORIES)), "<|endoftext|>"),
    ],
)  # fmt: skip
def test_every_document_is_in_one_split(tmp_path, name, data, separator):
    config = config_of(tmp_path, name, data, separator=separator, validation_fraction=0.1)
    train, validation = read(config, "train"), read(config, "validation")
    assert len(validation) == 4
    assert sorted(train + validation) == sorted(STORIES)
    assert read(config, "validation") == validation


def test_files_are_documents_in_sorted_order(tmp_path):
    for number, story in enumerate(STORIES):
        (tmp_path / f"{number:02}.txt").write_text(story)
    (tmp_path / "empty.txt").write_text("")
    config = DataConfig(source="text", path=(str(tmp_path / "*.txt"), str(tmp_path / "03.txt")))
    mask = held_out(40, config.validation_fraction)
    assert read(config, "train") == [story for story, out in zip(STORIES, mask, strict=True) if not out]
    assert read(config, "validation") == [story for story, out in zip(STORIES, mask, strict=True) if out]


def test_validation_files_are_taken_whole(text_config):
    config = text_config(STORIES[:30], STORIES[30:])
    assert read(config, "train") == STORIES[:30]
    assert read(config, "validation") == STORIES[30:]


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
@pytest.mark.parametrize("text", ["é" * 500, "猫 sat.\n" * 100, "ab", "x" * 77 + "\n"])
def test_a_lone_document_is_cut_in_two(tmp_path, text, fraction):
    config = config_of(tmp_path, "a.txt", text.encode(), validation_fraction=fraction)
    (train,), (validation,) = documents(config, "train"), documents(config, "validation")
    assert train and validation and train + validation == text
    if "\n" not in text:  # else it is cut after a line
        assert abs(len(validation) - len(text) * fraction) <= 1


def test_the_end_of_each_of_a_few_documents_is_held_out(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} {name}\n" * 100)
    config = DataConfig(source="text", path=(str(tmp_path / "*.txt"),), validation_fraction=0.1)
    train, validation = documents(config, "train"), documents(config, "validation")
    assert [a + b for a, b in zip(train, validation, strict=True)] == [f"{name} {name}\n" * 100 for name in "abc"]
    assert all(30 < len(part) < 60 for part in validation)


@given(
    st.lists(st.text("aé猫🙂\n", min_size=1, max_size=300).filter(str.strip), min_size=2, max_size=20),
    st.integers(4, 40),
)
def test_pieces_are_bounded_and_lose_nothing(tmp_path_factory, texts, piece_bytes):
    tmp_path = tmp_path_factory.mktemp("pieces")
    config = config_of(tmp_path, "a.txt", "|".join(texts).encode(), separator="|", validation_fraction=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "VALIDATION_PIECE_BYTES", piece_bytes)
        patch.setattr(sources, "LEAST_TRAIN_PIECE_BYTES", piece_bytes)
        patch.setattr(sources, "TRAIN_PIECE_BYTES_PER_TOKEN", 0)
        both = documents(config, "train") + documents(config, "validation")
        assert max(len(text.encode()) for text in read(config, "train")) <= piece_bytes
    assert sorted(both) == sorted(texts)


def test_bytes_that_are_not_utf8_are_refused_or_replaced(tmp_path):
    data = b"good|" * 30 + b"bad \xff\xfe here|" + b"\x80" * 9
    config = config_of(tmp_path, "a.txt", data, separator="|")
    with pytest.raises(ConfigError, match=r"a\.txt: not UTF-8 at byte 154; .*encoding_errors=replace"):
        open_source(config, "train")
    config = config_of(tmp_path, "a.txt", data, separator="|", encoding_errors="replace")
    assert "bad \ufffd\ufffd here" in read(config, "train") + read(config, "validation")


def test_the_offset_of_a_bad_byte_counts_from_the_start_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_BLOCK", 16)
    data = "猫".encode() * 33
    for offset in (0, 15, 47, 98):
        with pytest.raises(ConfigError, match=f"not UTF-8 at byte {offset}"):
            bad = data[: offset - offset % 3] if offset % 3 else data[:offset]
            open_source(config_of(tmp_path, "a.txt", data[: len(bad)] + b"x" * (offset % 3) + b"\xff" + data), "train")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 96"):
        open_source(config_of(tmp_path, "a.txt", data[:-1]), "train")


def test_half_a_surrogate_pair_in_json(tmp_path):
    data = b'{"text": "a \\ud83d b"}\n' * 30
    with pytest.raises(ConfigError, match="line 1: not UTF-8"):
        open_source(config_of(tmp_path, "a.jsonl", data), "train")
    config = config_of(tmp_path, "a.jsonl", data, encoding_errors="replace")
    assert set(read(config, "train")) == {"a \ufffd b"}


def test_memory_of_the_index_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "CACHED_FROM_BYTES", 1 << 20)
    document = "All work and no play makes a dull text.\n" * 25 + "<|end|>"
    config = config_of(tmp_path, "a.txt", (document * 20_000).encode(), separator="<|end|>")
    tracemalloc.start()
    source = open_source(config, "train")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 19_000
    assert source[18_999] == document.removesuffix("<|end|>")
    assert peak < 6e6  # the file has 20 MB
    (cached,) = (tmp_path / "cache").iterdir()
    written = cached.stat().st_mtime_ns
    assert len(open_source(config, "validation")) == 1_000
    assert cached.stat().st_mtime_ns == written


def test_a_changed_compressed_file_is_read_again(tmp_path):
    config = config_of(tmp_path, "a.txt.gz", gzip.compress(b"one two\n" * 9))
    assert "one" in read(config, "train")[0]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"three four five\n" * 9))
    assert "three" in read(config, "train")[0]


def test_the_standard_library_is_a_corpus():
    config = DataConfig()
    train, validation = open_source(config, "train"), open_source(config, "validation")
    assert len(train) > 300 and len(validation) > 10
    assert not {file.path for file in train.files if re.search(r"site-packages|/test/", file.path)}
    assert any(train[index].startswith('"""') for index in range(20))
    assert not set(map(tuple, _places(train))) & set(map(tuple, _places(validation)))


def _places(source):
    return np.column_stack([source.file_numbers, source.spans[:, 0]]).tolist()


ERRORS = {
    "missing": ("nowhere.txt", None, {}, r"data\.path: .*nowhere\.txt does not exist; give text files with --config"),
    "glob": ("*.nothing.txt", None, {}, r"matches no file"),
    "directory": (".", None, {}, r"is a directory; give its files"),
    "suffix": ("a.parquet", b"PAR1", {}, r"unknown suffix '\.parquet'; text files end in \.jsonl, \.txt"),
    "compressed suffix": ("a.tar.gz", b"", {}, r"unknown suffix '\.tar'"),
    "empty": ("a.txt", b"", {}, r"no text in .*a\.txt: empty"),
    "blank": ("a.txt", b" \n\n ", {}, r"no text in"),
    "short": ("a.txt", b"x", {}, r"too little text in .*a\.txt to hold some out; give data\.validation_path"),
    "gzip cut off": ("a.gz", gzip.compress(b"text" * 99)[:-9], {}, r"a\.gz is damaged"),
    "gzip wrong": ("a.txt.gz", b"plain text", {}, r"a\.txt\.gz is damaged or not what its suffix says"),
    "gzip checksum": ("a.gz", gzip.compress(b"text")[:-8] + b"\0" * 8, {}, r"a\.gz is damaged"),
    "zstd cut off": ("a.zst", zstandard.compress(b"text" * 99)[:-5], {}, r"a\.zst is damaged .* middle of a frame"),
    "zstd wrong": ("a.zst", b"plain text", {}, r"a\.zst is damaged"),
    "json": ("a.jsonl", b'{"text": "a"}\n{"text": \n', {}, r"a\.jsonl line 2: this line is not JSON"),
    "json field": ("a.jsonl", b'{"body": "a"}\n', {}, r"line 1: no text in field 'text' \(fields: body\); set"),
    "json type": ("a.jsonl", b'\n{"text": 1}', {}, r"a\.jsonl line 2: no text in field 'text'"),
    "json list": ("a.jsonl", b'["text"]', {}, r"it is a list"),
    "json utf-8": ("a.jsonl", b'{"text": "\xff"}', {}, r"a\.jsonl line 1: not UTF-8 at byte 10"),
    "json alone": ("a.jsonl", b'{"text": "a"}', {}, r"one document; hold others out with data\.validation_path"),
    "cache": ("a.gz", gzip.compress(b"text"), {"cache_directory": "/dev/null/cache"}, r"set data\.cache_directory"),
    "both": ("a.txt", b"text " * 99, {"validation_path": "self"}, r"is in data\.path and in data\.validation_path"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_that_names_the_fix(tmp_path, name):
    file, data, settings, message = ERRORS[name]
    if data is not None:
        (tmp_path / file).write_bytes(data)
    path = (str(tmp_path / file),)
    settings = {"cache_directory": str(tmp_path / "cache"), **settings}
    settings = {key: path if value == "self" else value for key, value in settings.items()}
    with pytest.raises(ConfigError, match=message) as caught:
        for split in ("train", "validation"):
            open_source(DataConfig(source="text", path=path, **settings), split)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*")), "a failure leaves nothing behind"


def test_the_fingerprint_tells_where_documents_lie(text_config, tmp_path):
    texts = ["one", "two", "three"]
    prints = [
        open_source(text_config(changed), "train").fingerprint
        for changed in (texts, ["one", "owt", "three"], ["on", "etwo", "three"], texts[:2])
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def names_of(pattern):
    return [file.name for file in text_files((str(pattern),), "data.path", "cache")]


def test_links_in_a_circle_are_followed_once(tmp_path):
    """Two links in a directory to itself make 2**40 paths, more than anybody waits for."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/1.txt", "a/b/2.txt", "a/b/3.md"):
        (tmp_path / name).write_text("text")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "4.txt").write_text("text")
    for link in ("a/x", "a/y", "a/b/z"):
        (tmp_path / link).symlink_to(tmp_path / "a")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    expected = [str(tmp_path / name) for name in ("a/1.txt", "a/b/2.txt", "a/link/4.txt")]
    assert names_of(tmp_path / "a" / "**" / "*.txt") == expected
    assert names_of(tmp_path / "a" / "**") == sorted([*expected, str(tmp_path / "a/b/3.md")])
    assert names_of(tmp_path / "*" / "b" / "**" / "2.txt") == [str(tmp_path / "a/b/2.txt")]


def test_globs_mean_what_they_mean_elsewhere(tmp_path, monkeypatch):
    for name in ("a/1.txt", "a/b/2.txt", "a/b/c/3.txt", "d/4.txt", ".hidden/5.txt", "a/.hidden/6.txt", "7.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path)
    for pattern in ("**/*.txt", "a/**/*.txt", "*/*.txt", "**/b/*.txt", "**/b/**/*.txt", f"{tmp_path}/**/?.txt", "a/**"):
        assert names_of(pattern) == sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True))) != []


@pytest.mark.parametrize(("path", "message"), [("pipe.txt", "is not a file"), ("/dev/zero", "is not a file")])
def test_pipes_and_devices_are_no_text(tmp_path, path, message):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ConfigError, match=message):
        names_of(tmp_path / path)
