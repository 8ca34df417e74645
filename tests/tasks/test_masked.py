"""Masked language modelling: which tokens are hidden, how, and what is learned of them, with a small BERT."""

import dataclasses
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from lin_jax.data.tokenizers import BytesTokenizer, LibraryTokenizer
from lin_jax.experiment import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    Gpt2Config,
    MaskedFinetuneConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from lin_jax.settings.command_line import apply_overrides
from lin_jax.tasks.masked import Masking
from lin_jax.train.loop import train
from lin_jax.train.metrics import read_metrics
from lin_jax.train.parts import make_parts
from lin_jax.train.saved_model import load_model
from lin_jax.train.sharding import make_partition
from lin_jax.train.start import completed
from lin_jax.train.workdir import read_settings
from tests.models.test_bert import make_config as make_bert
from tests.train.small_run import Killed, call_at, curve, final_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "run", "##ning", "##s", "the", "dog", "cat", "sat", "##ting"]
MASK = NAMES.index("[MASK]")


def word_piece():
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({name: number for number, name in enumerate(NAMES)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[MASK]"])
    return LibraryTokenizer(backend, end_id=2, begin_id=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A tokenizer's directory, and texts in which words follow each other by a rule."""
    root, random = tmp_path_factory.mktemp("masked"), np.random.default_rng(0)
    word_piece().save(root / "tokenizer")
    (root / "tokenizer" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "sep_token": "[SEP]", "mask_token": "[MASK]"}'
    )
    for name, count in (("train", 300), ("valid", 40)):
        lines = []
        for _ in range(count):
            word = str(random.choice(["dog", "cat"]))
            lines.append(f"the {word} " + ("runs running" if word == "dog" else "sat sitting"))
        (root / f"{name}.txt").write_text(" ".join(lines).replace("sitting", "satting"))
    return root


def make(text, workdir, **fields):
    given = {
        "model": make_bert("softmax", vocabulary_size=len(NAMES), width=16, positions=24),
        "data": DataConfig(
            source="text",
            path=(str(text / "train.txt"),),
            validation_path=(str(text / "valid.txt"),),
            tokenizer=str(text / "tokenizer"),
            sequence_length=20,
            batch_size=8,
        ),
        "optimizer": OptimizerConfig(peak_learning_rate=1e-2, schedule="constant"),
        "train": TrainConfig(steps=24, log_every=4, evaluate_every=8, evaluate_batches=0),
        "checkpoint": CheckpointConfig(every=8, keep=2),
        "finetune": MaskedFinetuneConfig(),
    }
    return Config(workdir=str(workdir), **{**given, **fields})


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    config, lines = make(text, tmp_path_factory.mktemp("masked_run") / "run"), []
    assert not train(config, lines.append).interrupted
    return config, lines


def rows_of(count, length=100, *, seed=0, **settings):
    """Rows of random tokens, and what masking makes of each."""
    random = np.random.default_rng(1)
    masking = Masking(word_piece(), MaskedFinetuneConfig(**settings), round(0.15 * (length + 2)), seed)
    for _ in range(count):
        targets = random.integers(5, len(NAMES), length).astype(np.int32)
        yield targets, masking({"targets": targets, "segment_ids": np.ones(length, np.int32)})


def test_15_percent_are_predicted_80_10_10():
    kinds, count = Counter(), 0
    for targets, row in rows_of(300):
        whole = np.concatenate([[1], targets, [2]])
        chosen = row["positions"][row["weights"] > 0]
        count += len(chosen)
        np.testing.assert_array_equal(row["targets"][row["weights"] > 0], whole[chosen])
        others = np.delete(np.arange(102), chosen)
        np.testing.assert_array_equal(row["tokens"][others], whole[others])
        assert len(set(chosen.tolist())) == len(chosen) and (row["segment_ids"] == 1).all()
        for place in chosen:
            token = row["tokens"][place]
            kinds["masked" if token == MASK else "kept" if token == whole[place] else "replaced"] += 1
    assert count == 300 * 15
    # A random token is the very token once in 13 times, and the mask as often; 4 standard deviations.
    expected = {"masked": 0.8 + 0.1 / 13, "kept": 0.1 + 0.1 / 13, "replaced": 0.1 * 11 / 13}
    for kind, part in expected.items():
        assert abs(kinds[kind] / count - part) < 4 * (part * (1 - part) / count) ** 0.5, kind


def test_words_are_chosen_whole():
    """Of every word that is predicted all of its tokens are."""
    continues = np.array([name.startswith("##") for name in NAMES])
    counts = []
    for targets, row in rows_of(50, whole_words=True):
        whole, chosen = np.concatenate([[1], targets, [2]]), set(row["positions"][row["weights"] > 0].tolist())
        counts.append(len(chosen))
        word = np.cumsum(~continues[whole])
        # What follows the start of the text begins a word, whatever it is.
        word[1] += 0.5 if continues[whole[1]] else 0
        groups = {}
        for place in range(1, 101):
            start = place
            while start > 1 and continues[whole[start]]:
                start -= 1
            groups.setdefault(start, set()).add(place)
        for group in groups.values():
            assert group <= chosen or not group & chosen
    assert 12 < np.mean(counts) <= 15


def test_the_same_row_is_masked_alike_and_another_seed_otherwise():
    first, again, other = (list(rows_of(5, seed=seed)) for seed in (0, 0, 1))
    for (_, one), (_, two), (_, three) in zip(first, again, other, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, two)
        assert (one["positions"] != three["positions"]).any()


def test_padding_and_special_tokens_are_left_alone():
    masking = Masking(word_piece(), MaskedFinetuneConfig(masked_part=0.9), 18, 0)
    targets, ids = np.array([5, 2, 8, 3, 9, 0, 0, 0]), np.array([1, 1, 1, 1, 1, 0, 0, 0])
    row = masking({"targets": targets, "segment_ids": ids})
    assert row["tokens"].shape == (10,) and row["segment_ids"].tolist() == [1] * 7 + [0] * 3
    assert set(row["positions"][row["weights"] > 0].tolist()) <= {1, 3, 5}
    empty = masking({"targets": np.zeros(8, np.int32), "segment_ids": np.zeros(8, np.int32)})
    assert not any(array.any() for array in empty.values())


def test_the_loss_is_that_of_the_hidden_tokens(text, tmp_path):
    config = completed(make(text, tmp_path))
    parts = make_parts(config, make_partition(MeshConfig(), jax.devices()[:1]))
    parameters, constants = parts.structure.initialise(jnp.uint32(0))
    batch = {name: jnp.asarray(x) for name, x in next(parts.task.training_batches(word_piece(), range(8))).items()}
    loss = parts.task.loss(parts.structure, parts.partition)

    def plain(parameters):
        model = parts.structure.merge(parameters, constants)
        found = jax.nn.log_softmax(model(batch["tokens"], batch["segment_ids"]))
        rows = jnp.arange(8)[:, None]
        return -jnp.sum(found[rows, batch["positions"], batch["targets"]] * batch["weights"])

    def own(parameters):
        return loss(parameters, {}, constants, batch, None).loss

    np.testing.assert_allclose(own(parameters), plain(parameters), rtol=1e-5)
    found, wanted = jax.grad(own)(parameters), jax.grad(plain)(parameters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), found, wanted)


def test_it_learns_and_what_is_said_is_what_the_saved_model_does(whole):
    config, lines = whole
    last = read_metrics(Path(config.workdir, "metrics.jsonl"))[-1]
    # Less than of all tokens alike, and of the few words there are.
    assert last["validation_loss"] < 0.87 * np.log(len(NAMES))
    model, tokenizer = load_model(config.workdir)[:2]
    parts = make_parts(read_settings(config.workdir), make_partition(MeshConfig(), jax.devices()[:1]))
    right, nll, count = 0, 0.0, 0
    for batch in parts.task.validation_batches("", tokenizer, range(8)):
        found = jax.nn.log_softmax(model(jnp.asarray(batch["tokens"]), jnp.asarray(batch["segment_ids"])))
        for row, places in enumerate(batch["positions"]):
            for place, target, weight in zip(places, batch["targets"][row], batch["weights"][row], strict=True):
                right += weight * (int(jnp.argmax(found[row, place])) == target)
                nll -= weight * float(found[row, place, target])
                count += weight
    np.testing.assert_allclose(last["accuracy"], right / count)
    np.testing.assert_allclose(last["validation_loss"], nll / count, rtol=1e-5)
    assert any("of masked tokens guessed right" in line for line in lines)
    assert any("masked_tokens/s" in line for line in lines)


def test_killed_it_goes_on_bit_for_bit(whole, text, tmp_path, monkeypatch):
    def kill():
        raise Killed

    config = make(text, tmp_path / "run")
    with monkeypatch.context() as patch:
        call_at(patch, 13, kill)
        with pytest.raises(Killed):
            train(config, lambda line: None)
    train(config, lambda line: None)
    assert final_state(read_settings(config.workdir)) == final_state(read_settings(whole[0].workdir))
    assert curve(config) == curve(whole[0])


def test_a_mesh_of_all_kinds_gives_the_same_losses_with_dropout(text, tmp_path):
    """What is dropped does not depend on the devices."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    losses = []
    for number, of_run in enumerate((MeshConfig(), mesh)):
        config = make(text, tmp_path / str(number), mesh=of_run, train=TrainConfig(steps=4, log_every=4))
        config = apply_overrides(config, ["--config.model.dropout=0.2"])
        train(config, lambda line: None)
        losses.append([line["loss"] for line in curve(config) if "loss" in line])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_head_is_new_where_the_base_has_none(text, whole, tmp_path):
    base = make(text, tmp_path / "base", train=TrainConfig(steps=1, evaluate_every=0))
    train(base, lambda line: None)
    plain = dataclasses.replace(base.model, masked_head=False)
    lines = []
    finetune = MaskedFinetuneConfig(checkpoint=str(tmp_path / "base"))
    run = make(text, tmp_path / "run", model=plain, finetune=finetune, train=base.train)
    train(run, lines.append)
    assert not any("new, with random values" in line for line in lines)
    assert read_settings(run.workdir).model.masked_head
    model = load_model(run.workdir)[0]
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))} >= {"masked_head", "layers"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("finetune.mask_token=<mask>", "no token '<mask>': set finetune.mask_token"),
        ("finetune.masked_part=1", "masked_part must lie between 0 and 1, but is 1"),
        ("data.packing=segments", "data.packing=segments is not for masked_language_model"),
        ("data.sequence_length=3", "data.sequence_length=3 is too short"),
        ("data.sequence_length=25", "more than the model's positions=24"),
    ],
)
def test_what_cannot_be_done_is_refused(text, tmp_path, override, message):
    with pytest.raises(ConfigError) as error:
        config = make(text, tmp_path / "run")
        train(apply_overrides(config, [f"--config.{override}"]), lambda line: None)
    assert message in str(error.value) and not (tmp_path / "run").exists()


def test_other_models_are_refused(text, tmp_path):
    config = make(text, tmp_path / "run", model=Gpt2Config())
    with pytest.raises(ConfigError, match="masked_language_model cannot be done by gpt2; models that can: bert"):
        train(config, lambda line: None)


def test_word_beginnings_are_told_by_marks():
    found = word_piece().word_beginnings()
    assert found.tolist() == [not name.startswith("##") for name in NAMES]
    with pytest.raises(ConfigError, match="does not mark where words begin"):
        BytesTokenizer().word_beginnings()
    byte_level = tokenizers.Tokenizer(tokenizers.models.BPE({"Ġa": 0, "b": 1, "</s>": 2}, []))
    assert LibraryTokenizer(byte_level, end_id=2, begin_id=None).word_beginnings().tolist() == [True, False, False]
