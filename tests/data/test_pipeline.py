"""Batches: every token once an epoch, the same for any number of hosts, exact after a resume."""

import collections
import dataclasses
import itertools
import json
import random

import grain.checkpoint
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lin_jax.data import pipeline
from lin_jax.data.documents import validation_documents
from lin_jax.data.pipeline import training_batches, validation_batches, validation_bytes_per_token
from lin_jax.data.tokenizers import BytesTokenizer
from lin_jax.experiment import ConfigError, DataConfig

TOKENIZER = BytesTokenizer()
END = TOKENIZER.end_id
PACKINGS = ("concatenate", "segments")


def texts_of(lengths, seed=0):
    letters = random.Random(seed)
    return ["".join(letters.choices("abcdefghijklmnop", k=length)) for length in lengths]


def rows_of(config, host, hosts):
    return np.split(np.arange(config.batch_size), hosts)[host]


def train(config, host=0, hosts=1):
    return training_batches(config, TOKENIZER, rows_of(config, host, hosts))


def validate(config, host=0, hosts=1):
    return validation_batches(config, TOKENIZER, rows_of(config, host, hosts))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name])


def expected_pairs(texts):
    """How often each (token, next token) must be seen in an epoch."""
    pairs = collections.Counter()
    for text in texts:
        ids = [*text.encode(), END]
        pairs.update(zip([END, *ids[:-1]], ids, strict=True))
    return pairs


def seen_pairs(batches):
    pairs = collections.Counter()
    for batch in batches:
        real = batch["weights"] > 0
        pairs.update(zip(batch["tokens"][real].tolist(), batch["targets"][real].tolist(), strict=True))
    return pairs


lengths_of_documents = st.lists(st.integers(1, 70), min_size=1, max_size=30)


def write(tmp_path_factory, texts, **settings):
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    other = path.with_name("b.jsonl")
    other.write_text('{"text": "training"}\n')
    return DataConfig(source="text", path=(str(other),), validation_path=(str(path),), **settings)


@given(lengths_of_documents, st.integers(1, 40), st.integers(1, 5), st.sampled_from(PACKINGS))
def test_validation_has_every_token_once(tmp_path_factory, lengths, row, batch, packing):
    texts = texts_of(lengths)
    config = write(tmp_path_factory, texts, sequence_length=row, batch_size=batch, packing=packing)
    batches = list(validate(config))
    assert seen_pairs(batches) == expected_pairs(texts)
    for batch_of_rows in batches:
        assert {name: column.shape for name, column in batch_of_rows.items()} == dict.fromkeys(
            batch_of_rows, (batch, row)
        )
        assert [column.dtype for column in batch_of_rows.values()] == [np.int32, np.int32, np.int32, np.float32]
        np.testing.assert_array_equal(batch_of_rows["weights"], batch_of_rows["segment_ids"] > 0)
        assert packing == "segments" or batch_of_rows["segment_ids"].max() <= 1


@given(lengths_of_documents, st.integers(1, 40))
def test_segments_are_documents_or_parts_of_long_ones(tmp_path_factory, lengths, row):
    texts = texts_of(lengths)
    config = write(tmp_path_factory, texts, sequence_length=row, batch_size=2, packing="segments")
    expected = collections.Counter()
    for text in texts:
        ids = (*text.encode(), END)
        expected.update(ids[at : at + row] for at in range(0, len(ids), row))
    seen = collections.Counter()
    for batch in validate(config):
        for targets, segment_ids in zip(batch["targets"], batch["segment_ids"], strict=True):
            numbers = segment_ids[segment_ids > 0]
            assert (np.diff(numbers) >= 0).all() and set(numbers) == set(range(1, numbers.max(initial=0) + 1))
            seen.update(tuple(targets[segment_ids == number].tolist()) for number in set(numbers.tolist()))
    assert seen == expected


def test_rows_of_concatenation_are_cut_from_one_stream(text_config, monkeypatch):
    monkeypatch.setattr(pipeline.experimental, "WindowShuffleIterDataset", lambda rows, **_: rows)
    texts = texts_of([5, 40, 17, 80])
    batches = take(train(text_config(texts, sequence_length=9, batch_size=2)), 34)
    tokens, targets = (np.concatenate([batch[name].ravel() for batch in batches]) for name in ("tokens", "targets"))
    np.testing.assert_array_equal(tokens, [END, *targets[:-1]])
    documents = bytes(np.where(targets == END, ord("|"), targets).tolist()).decode().split("|")
    assert [sorted(documents[at : at + 4]) for at in (0, 4, 8)] == [sorted(texts)] * 3
    assert all((batch["segment_ids"] == 1).all() and (batch["weights"] == 1).all() for batch in batches)


@pytest.mark.parametrize("packing", PACKINGS)
def test_each_epoch_is_another_order_of_all_tokens(text_config, monkeypatch, packing):
    texts = texts_of([7] * 64)  # with their ends, a row each
    monkeypatch.setattr(pipeline, "WINDOW_ROWS", 64)
    monkeypatch.setattr(pipeline, "PACKING_BINS", 64)
    config = text_config(texts, sequence_length=8, batch_size=4, packing=packing)
    batches = take(train(config), 48)
    epochs = [batches[at : at + 16] for at in (0, 16, 32)]
    for epoch in epochs:
        assert seen_pairs(epoch) == expected_pairs(texts)
    orders = [np.concatenate([batch["targets"] for batch in epoch]).tobytes() for epoch in epochs]
    other = take(train(dataclasses.replace(config, seed=1)), 16)
    orders.append(np.concatenate([batch["targets"] for batch in other]).tobytes())
    assert len(set(orders)) == 4
    for batch, again in zip(batches, train(config), strict=False):
        assert_same(batch, again)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_one_sequence_of_batches(text_config, monkeypatch, packing, hosts):
    monkeypatch.setattr(pipeline, "WINDOW_ROWS", 50)
    config = text_config(texts_of(range(1, 60)), texts_of(range(20)), sequence_length=16, batch_size=8, packing=packing)
    for make, count in ((train, 30), (validate, None)):
        whole = take(make(config), count)
        parts = [take(make(config, host, hosts), count) for host in range(hosts)]
        assert len({len(part) for part in parts} | {len(whole)}) == 1
        for batch, *own in zip(whole, *parts, strict=True):
            assert {len(part["tokens"]) for part in own} == {8 // hosts}
            assert_same(batch, {name: np.concatenate([part[name] for part in own]) for name in batch})


@pytest.mark.parametrize("packing", PACKINGS)
def test_resuming_is_exact_at_every_step_and_on_other_hosts(text_config, monkeypatch, packing):
    monkeypatch.setattr(pipeline, "WINDOW_ROWS", 20)
    monkeypatch.setattr(pipeline, "PACKING_BINS", 6)
    # Lengths such that documents often end with a row, where Grain's own state would not survive JSON.
    config = text_config(texts_of([7, 15, 3, 3, 30, 8, 1, 6, 23, 70]), sequence_length=8, batch_size=2, packing=packing)
    iterator, states, batches = train(config), [], []
    for _ in range(70):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    other_host = train(config, 1, 2)
    resumed = train(config)
    for step in random.Random(0).sample(range(66), 30):
        resumed.set_state(json.loads(states[step]))
        for batch, again in zip(batches[step : step + 4], resumed, strict=False):
            assert_same(batch, again)
    for step in (0, 1, 31, 62):
        other_host.set_state(json.loads(states[step]))
        assert_same({name: column[1:] for name, column in batches[step].items()}, next(other_host))
        assert json.dumps(other_host.get_state()) == states[step + 1]


def test_the_iterator_goes_through_orbax(text_config, monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "WINDOW_ROWS", 5)
    config = text_config(texts_of(range(1, 80)), sequence_length=16, batch_size=2)
    iterator = train(config)
    take(iterator, 7)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = take(iterator, 5)
        restored = train(config)
        manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
    for batch, again in zip(expected, restored, strict=False):
        assert_same(batch, again)


def test_pieces_of_a_long_document_end_once(tmp_path):
    text = "".join(f"line {number} é\n" for number in range(20_000))
    (tmp_path / "a.txt").write_text(text)
    config = DataConfig(source="text", path=(str(tmp_path / "a.txt"),), validation_fraction=0.9, sequence_length=512)
    ((ids, size),) = validation_documents(config, TOKENIZER)
    assert text.endswith(TOKENIZER.decode(ids)) and size == len(TOKENIZER.decode(ids).encode()) > 200_000
    assert ids[-1] == END and (ids == END).sum() == 1 and ids.dtype == np.int32
    targets = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in validate(config)])
    assert (len(targets), (targets == END).sum()) == (size + 1, 1)


def test_validation_documents_and_bytes_per_token(text_config):
    texts = ["été", *texts_of([5, 9, 200])]
    config = text_config(["training"], texts)
    assert [(TOKENIZER.decode(ids), size) for ids, size in validation_documents(config, TOKENIZER)] == [
        (text, len(text.encode())) for text in texts
    ]
    size = sum(len(text.encode()) for text in texts)
    assert validation_bytes_per_token(config, TOKENIZER) == pytest.approx(size / (size + len(texts)))


class BeginningTokenizer(BytesTokenizer):
    vocabulary_size = 258
    begin_id = 257


def test_documents_start_from_the_token_for_it(text_config):
    config = text_config(["training"], ["abc", "de"], sequence_length=9, batch_size=1, packing="concatenate")
    (batch,) = validation_batches(config, BeginningTokenizer())
    rows = {(tuple(batch["tokens"][0]), tuple(batch["targets"][0]))}
    assert rows < {
        ((257, 97, 98, 99, 257, 100, 101, 0, 0), (97, 98, 99, END, 100, 101, END, 0, 0)),
        ((257, 100, 101, 257, 97, 98, 99, 0, 0), (100, 101, END, 97, 98, 99, END, 0, 0)),
    }


def test_a_host_may_want_any_rows(text_config):
    config = text_config(texts_of([30] * 40), sequence_length=16)
    (whole,), (some,) = (take(training_batches(config, TOKENIZER, rows), 1) for rows in (None, [1, 4, 6]))
    for name, column in whole.items():
        np.testing.assert_array_equal(some[name], column[[1, 4, 6]])


def test_user_errors_pass_through_the_threads(text_config, tmp_path):
    config = text_config(["text " * 99] * 20, sequence_length=16)
    iterator = train(config)
    (tmp_path / "train.jsonl").write_text('{"body": 1}\n' * 5000)
    with pytest.raises(ConfigError, match="line at byte"):
        take(iterator, 5000)
