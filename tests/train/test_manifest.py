"""The manifest of a checkpoint: it notices every kind of damage to every file, whichever process looks at it."""

import json
import threading

import hypothesis
import jax
import pytest
from etils import epath
from hypothesis import strategies

from lin_jax.train import manifest
from lin_jax.train.manifest import MANIFEST, DamagedError, require_undamaged, write_manifest

ITEMS = ("model", "data")
FILES = {
    "model/_METADATA": b"{}",
    "model/ocdbt.process_0/d/0123": bytes(range(256)) * 40,
    "model/ocdbt.process_1/manifest.ocdbt": b"abc",
    "data/metadata": b'{"position": 3}',
    "data/empty": b"",
}


def flip(content, draw):
    at = draw(strategies.integers(0, len(content) - 1))
    return content[:at] + bytes([content[at] ^ draw(strategies.integers(1, 255))]) + content[at + 1 :]


def cut(content, draw):
    return content[: draw(strategies.integers(0, len(content) - 1))]


def append(content, draw):
    return content + draw(strategies.binary(min_size=1, max_size=5))


def make(directory, files=FILES):
    for name, content in files.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (directory / "_CHECKPOINT_METADATA").write_text("changes later")
    write_manifest(epath.Path(directory))
    return epath.Path(directory)


@hypothesis.given(data=strategies.data())
def test_any_change_to_any_file_is_noticed(tmp_path_factory, data):
    directory = make(tmp_path_factory.mktemp("checkpoint"))
    require_undamaged(directory, ITEMS)
    name = data.draw(strategies.sampled_from([name for name in FILES if FILES[name]]))
    damage = data.draw(strategies.sampled_from([flip, cut, append]))
    (directory / name).write_bytes(damage(FILES[name], data.draw))
    with pytest.raises(DamagedError, match=name):
        require_undamaged(directory, ITEMS)
    item = name.split("/")[0]
    require_undamaged(directory, [other for other in ITEMS if other != item])


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_a_directory_is_noticed(tmp_path, name):
    directory = make(tmp_path)
    (directory / name).unlink()
    for _ in range(2):
        with pytest.raises(DamagedError):
            require_undamaged(directory, ITEMS)
        (directory / name).mkdir(exist_ok=True)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"model/_METADATA": 3}', b'{"model/_METADATA": [1, "x"]}', b"\xff"]
)
def test_a_damaged_manifest_is_damage(tmp_path, content):
    directory = make(tmp_path)
    (directory / MANIFEST).write_bytes(content)
    with pytest.raises(DamagedError, match=MANIFEST):
        require_undamaged(directory, ITEMS)


def test_without_a_manifest_it_is_of_an_earlier_version(tmp_path):
    directory = make(tmp_path)
    (directory / MANIFEST).unlink()
    (directory / "data/metadata").write_bytes(b"")
    require_undamaged(directory, ITEMS)


@pytest.mark.parametrize("processes", [2, 3])
def test_all_processes_together_look_at_every_file_once(tmp_path, monkeypatch, processes):
    directory = make(tmp_path)
    read, lock, original = [], threading.Lock(), manifest._sum_of_file

    def sum_of_file(file):
        with lock:
            read.append(file.relative_to(directory).as_posix())
        return original(file)

    monkeypatch.setattr(manifest, "_sum_of_file", sum_of_file)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(manifest, "any_process", lambda value: value)
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        require_undamaged(directory, ITEMS)
    assert sorted(read) == sorted(FILES) == sorted(json.loads((directory / MANIFEST).read_text()))


def test_what_another_process_found_is_damage_here(tmp_path, monkeypatch):
    directory = make(tmp_path)
    monkeypatch.setattr(manifest, "any_process", lambda value: True)
    with pytest.raises(DamagedError, match="another process"):
        require_undamaged(directory, ITEMS)
