"""Which files of a directory hold its tensors: those that transformers reads, and none outside of it."""

import itertools
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lin_jax.convert.checkpoint_files import CheckpointFiles
from lin_jax.settings.base import ConfigError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def write_index(directory, where):
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")


@pytest.fixture
def sharded(tmp_path):
    for number, shard in enumerate(SHARDS):
        save_file({f"t{number}": np.full(3, number, np.float32)}, tmp_path / shard)
    write_index(tmp_path, {"t0": SHARDS[0], "t1": SHARDS[1]})
    return tmp_path


def write_places(directory, names):
    """Files of each name, which tell by their one tensor which of them was read; torch's are not to be opened."""
    for name in names:
        if name == "model.safetensors":
            save_file({"single": np.zeros(2, np.float32)}, directory / name)
        elif name == INDEX:
            save_file({"sharded": np.zeros(2, np.float32)}, directory / SHARDS[0])
            write_index(directory, {"sharded": SHARDS[0]})
        else:
            (directory / name).write_bytes(b"not to be read")


PLACES = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


@pytest.mark.parametrize("names", [n for size in range(1, 5) for n in itertools.combinations(PLACES, size)])
def test_the_first_place_in_the_order_of_transformers_is_read(names, tmp_path):
    write_places(tmp_path, names)
    first = next(name for name in PLACES if name in names)
    if first in PLACES[:2]:
        assert list(CheckpointFiles(tmp_path)) == [{"model.safetensors": "single", INDEX: "sharded"}[first]]
    else:
        with pytest.raises(ConfigError, match=rf"{first}"):
            CheckpointFiles(tmp_path)


def test_shards(sharded):
    found = CheckpointFiles(sharded)
    assert list(found) == ["t0", "t1"] and found["t1"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("way", ["../{name}", "{directory}/{name}", "inner/../../outside/{name}", "link", "inner/link"])
def test_an_index_names_no_file_outside_its_directory(way, tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "inner").mkdir(parents=True)
    outside.mkdir()
    save_file({"t": np.zeros(2, np.float32)}, outside / "t.safetensors")
    save_file({"t": np.zeros(2, np.float32)}, tmp_path / "t.safetensors")
    for link in ("link", "inner/link"):
        (inside / link).symlink_to(outside / "t.safetensors")
    name = way.format(name="t.safetensors", directory=outside)
    write_index(inside, {"t": name})
    with pytest.raises(ConfigError, match="which leads out of its directory") as error:
        CheckpointFiles(inside)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_the_links_of_the_hub_s_cache_are_followed(tmp_path):
    blobs, revision = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    revision.mkdir(parents=True)
    save_file({"t": np.ones(2, np.float32)}, blobs / "1234")
    (revision / SHARDS[0]).symlink_to("../../blobs/1234")
    write_index(revision, {"t": SHARDS[0]})
    assert CheckpointFiles(revision)["t"].tolist() == [1, 1]


def test_an_index_that_does_not_fit_its_files(sharded):
    write_index(sharded, {"t0": SHARDS[0], "t1": SHARDS[1], "t2": SHARDS[1]})
    with pytest.raises(ConfigError, match="its index names t2, which its files do not hold"):
        CheckpointFiles(sharded)
    write_index(sharded, {"t0": SHARDS[0]})
    (sharded / SHARDS[1]).unlink()
    save_file({"t0": np.zeros(3, np.float32), "extra": np.zeros(1, np.float32)}, sharded / SHARDS[0])
    with pytest.raises(ConfigError, match="does not name extra, which its files hold"):
        CheckpointFiles(sharded)
    write_index(sharded, {"t0": SHARDS[1]})
    with pytest.raises(ConfigError, match=rf"lacks {SHARDS[1]}"):
        CheckpointFiles(sharded)
