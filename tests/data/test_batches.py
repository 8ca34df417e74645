"""Batches of examples: every one once an epoch, in rows of few lengths, resumed exactly; tokens as transformers'."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lin_jax.data import batches as module
from lin_jax.data.batches import batches_of, count_batches, lengths
from lin_jax.data.examples import Examples
from lin_jax.data.tokenizers import BytesTokenizer, LibraryTokenizer, load_tokenizer, longest_first
from lin_jax.settings.base import ConfigError
from lin_jax.settings.data import DataConfig

REAL = Path(os.environ.get("LIN_JAX_GOLDEN", "../shared/golden")).parent / "data" / "tokenizers"


def examples(count, seed=0):
    sizes = np.random.default_rng(seed).integers(0, 40, count)
    return Examples("x", ["a" * size for size in sizes], None, None, range(count))


def take(count, number, rows=None, trains=True, **more):
    config = DataConfig(sequence_length=32, batch_size=4, **more)
    labels = np.arange(count, dtype=np.int32)
    iterator = batches_of(config, BytesTokenizer(), examples(count), labels, rows, trains=trains)
    return iterator, [next(iterator) for _ in range(number)]


def test_every_example_comes_once_an_epoch_and_validation_ends(monkeypatch):
    monkeypatch.setattr(module, "WINDOW_BATCHES", 3)
    _, found = take(30, 16)  # 8 batches an epoch, the last of 2 examples
    for epoch in (found[:8], found[8:]):
        seen = np.concatenate([batch["examples"] for batch in epoch])
        assert sorted(seen[seen >= 0]) == list(range(30)) and np.sum(seen < 0) == 2
    assert not np.array_equal(found[0]["examples"], found[8]["examples"])
    for batch in found:
        assert batch["tokens"].shape[1] in lengths(32, "bucket") == [8, 12, 16, 24, 32]
        real = batch["examples"] >= 0
        np.testing.assert_array_equal(batch["weights"], real)
        np.testing.assert_array_equal(batch["labels"][real], batch["examples"][real])
        sizes = [max(1, min(32, len(examples(30).first[row]))) for row in batch["examples"][real]]
        np.testing.assert_array_equal(batch["segment_ids"].sum(1)[real], sizes)
    iterator, _ = take(30, 0, trains=False)
    assert sum(np.sum(batch["examples"] >= 0) for batch in iterator) == 30
    assert {batch["tokens"].shape[1] for batch in take(30, 8, padding="fixed")[1]} == {32}


def test_batches_are_resumed_from_json_and_cut_over_hosts(monkeypatch):
    monkeypatch.setattr(module, "WINDOW_BATCHES", 3)
    iterator, _ = take(30, 5)
    state = json.loads(json.dumps(iterator.get_state()))
    wanted = [next(iterator) for _ in range(6)]
    again, _ = take(30, 0)
    again.set_state(state)
    part, _ = take(30, 0, rows=[1, 3])
    part.set_state(state)
    for batch in wanted:
        resumed, own = next(again), next(part)
        for name, array in batch.items():
            np.testing.assert_array_equal(resumed[name], array)
            np.testing.assert_array_equal(own[name], array[[1, 3]])


def test_little_is_computed_for_padding():
    _, found = take(400, 100)
    real = sum(batch["segment_ids"].sum() for batch in found)
    assert real / sum(batch["tokens"].size for batch in found) > 0.82
    assert count_batches(DataConfig(batch_size=32), 65) == 3


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
@settings(deadline=None)
def test_tokens_are_taken_from_the_longer_text(first, second, length):
    a, b = first, second
    while a + b > length:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    assert longest_first(first, second, length) == (a, b)


@pytest.mark.skipif(not (REAL / "gpt2").is_dir(), reason="no real tokenizers beside the golden vectors")
@pytest.mark.parametrize("name", ["bert_uncased", "gpt2"])
def test_tokens_are_those_of_transformers(name, tmp_path):
    import transformers

    files = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
    for file in (REAL / name).iterdir():
        (tmp_path / files.get(file.name, file.name)).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name.partition("_")[0]}))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = load_tokenizer(DataConfig(tokenizer=str(tmp_path)), tmp_path)
    first = ["A man said: no.", "word " * 30, "short", ""]
    second = ["He didn't deny it!", "other " * 3, "long text " * 20, "x"]
    for pair in (None, second):
        wanted = theirs(first, pair, truncation="longest_first", max_length=16)
        found = ours.encode_examples(first, pair, 16)
        assert [ids.tolist() for ids, _ in found] == wanted["input_ids"]
        if "token_type_ids" in wanted:
            assert [types.tolist() for _, types in found] == wanted["token_type_ids"]


@pytest.mark.parametrize("second", [None, ["b"]])
def test_rows_without_room_for_special_tokens_are_refused(second):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[CLS]": 0, "[SEP]": 1, "a": 2, "b": 3}, "a"))
    names = [("[CLS]", 0), ("[SEP]", 1)]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", names
    )
    tokenizer = LibraryTokenizer(backend, end_id=1, begin_id=0)
    with pytest.raises(ConfigError, match="data.sequence_length=1 has no room for the tokenizer's special tokens"):
        tokenizer.encode_examples(["a"], second, 1)
