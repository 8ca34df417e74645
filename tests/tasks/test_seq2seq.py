"""Sequence to sequence: what is learned, measured, written and refused, with a small T5 on the bytes of a table."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

import eval as eval_program
import lin_jax
from lin_jax.data.examples import open_pairs
from lin_jax.data.tokenizers import BytesTokenizer
from lin_jax.experiment import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Seq2seqFinetuneConfig,
    TrainConfig,
)
from lin_jax.settings.command_line import apply_overrides
from lin_jax.tasks.seq2seq import text_measures
from lin_jax.train.loop import train
from lin_jax.train.metrics import read_metrics
from lin_jax.train.parts import make_parts
from lin_jax.train.saved_model import load_model
from lin_jax.train.sharding import make_partition
from lin_jax.train.start import completed
from lin_jax.train.workdir import read_settings
from tests.models.test_t5 import make_config as make_t5
from tests.train.small_run import Killed, call_at, curve, final_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

WORDS = {"a": "one", "b": "two", "c": "six"}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Letters, and the word of the first of them."""
    root, random = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for name, count in (("train", 60), ("dev", 11)):
        rows = []
        for _ in range(count):
            letters = "".join(random.choice(list(WORDS), random.integers(1, 12)))
            rows.append({"article": letters, "summary": WORDS[letters[0]]})
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def make(tables, workdir, **fields):
    given = {
        "model": make_t5("augmented", vocabulary_size=257, width=16),
        "data": DataConfig(
            source="table",
            path=(str(tables / "train.jsonl"),),
            validation_path=(str(tables / "dev.jsonl"),),
            text_field="article",
            target_field="summary",
            prefix="> ",
            sequence_length=16,
            target_length=6,
            batch_size=8,
        ),
        "optimizer": OptimizerConfig(peak_learning_rate=2e-2),
        "train": TrainConfig(epochs=3, log_every=4, evaluate_every=8, evaluate_batches=0),
        "checkpoint": CheckpointConfig(every=8, keep=2),
        "finetune": Seq2seqFinetuneConfig(generated_examples=5),
    }
    return Config(workdir=str(workdir), **{**given, **fields})


@pytest.fixture(scope="module")
def whole(tables, tmp_path_factory):
    config, lines = make(tables, tmp_path_factory.mktemp("seq2seq") / "run"), []
    assert not train(config, lines.append).interrupted
    return config, lines


def batches(config):
    config = completed(config)
    parts = make_parts(config, make_partition(MeshConfig(), jax.devices()[:1]))
    found = next(parts.task.training_batches(BytesTokenizer(), range(8)))
    return parts, {name: np.asarray(array) for name, array in found.items()}


def test_a_batch_holds_sources_and_targets(tables, tmp_path):
    """Read back from its bytes: each target follows its source, shifted behind the start token."""
    _, batch = batches(make(tables, tmp_path))
    tokenizer = BytesTokenizer()
    assert batch["source"].shape[1] in (8, 12, 16) and batch["tokens"].shape[1] in (3, 6)
    for row in range(8):
        source = batch["source"][row][batch["source_ids"][row] == 1]
        weights = batch["weights"][row] == 1
        target, before = batch["targets"][row][weights], batch["tokens"][row][weights]
        letters = tokenizer.decode(source).removeprefix("> ")
        assert source[-1] == target[-1] == 256 and tokenizer.decode(target) == WORDS[letters[0]]
        assert before[0] == 0 and (before[1:] == target[:-1]).all()


def test_what_is_too_long_is_cut_before_its_end(tables, tmp_path):
    data = dataclasses.replace(make(tables, "x").data, sequence_length=5, target_length=3, padding="fixed")
    _, batch = batches(make(tables, tmp_path, data=data))
    for row in range(8):
        assert batch["source"][row].shape == (5,) and batch["source"][row][batch["source_ids"][row] == 1][-1] == 256
        assert batch["targets"][row][batch["weights"][row] == 1].tolist()[-1] == 256
        assert batch["targets"][row].shape == (3,)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_is_that_of_the_plain_loss(tables, tmp_path, smoothing):
    config = make(tables, tmp_path, finetune=Seq2seqFinetuneConfig(label_smoothing=smoothing))
    parts, batch = batches(apply_overrides(config, ["--config.train.loss_chunk=16"]))
    parameters, constants = parts.structure.initialise(jnp.uint32(0))
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    loss = parts.task.loss(parts.structure, parts.partition)

    def plain(parameters):
        model = parts.structure.merge(parameters, constants)
        logits = jax.nn.log_softmax(model(batch["source"], batch["tokens"], batch["source_ids"]))
        chosen = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(((1 - smoothing) * chosen + smoothing * jnp.mean(logits, axis=-1)) * batch["weights"])

    def own(parameters):
        return loss(parameters, {}, constants, batch, None).loss

    np.testing.assert_allclose(own(parameters), plain(parameters), rtol=1e-5)
    found, wanted = jax.grad(own)(parameters), jax.grad(plain)(parameters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), found, wanted)


def test_it_learns_and_what_it_writes_is_measured(whole, tables):
    """The last line of the metrics is of the texts that the saved model writes."""
    config, lines = whole
    assert read_settings(config.workdir).train.steps == 3 * 8
    found = read_metrics(Path(config.workdir, "metrics.jsonl"))
    first, last = (line for line in (found[0], found[-1]))
    assert last["validation_loss"] < 0.5 * first["loss"]
    assert all(0 < line["real_tokens"] < line["computed_tokens"] <= 8 * 22 for line in found if "loss" in line)
    rows = [json.loads(line) for line in (tables / "dev.jsonl").read_text().splitlines()]
    chosen = [rows[place] for place in np.linspace(0, 10, 5).astype(int)]
    model, tokenizer = lin_jax.load(config.workdir)
    texts = lin_jax.generate(model, tokenizer, [f"> {row['article']}" for row in chosen], max_new_tokens=6)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    scores = [scorer.score(row["summary"], text) for row, text in zip(chosen, texts, strict=True)]
    for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        np.testing.assert_allclose(last[kind], 100 * np.mean([score[kind].fmeasure for score in scores]), rtol=1e-6)
    assert any("ROUGE-Lsum" in line for line in lines)
    assert last["exact"] == np.mean([row["summary"] == text for row, text in zip(chosen, texts, strict=True)])


def test_the_best_checkpoint_is_that_of_the_highest_rouge(tables, tmp_path):
    config = make(tables, tmp_path)
    task = make_parts(completed(config), make_partition(MeshConfig(), jax.devices()[:1])).task
    assert task.cost({"rougeLsum": 30.0}) < task.cost({"rougeLsum": 20.0})
    other = dataclasses.replace(config, finetune=Seq2seqFinetuneConfig(generated_examples=0))
    task = make_parts(completed(other), make_partition(MeshConfig(), jax.devices()[:1])).task
    assert task.cost({"validation_loss": 2.0}) < task.cost({"validation_loss": 3.0})


def test_eval_measures_a_table_and_writes_the_texts(whole, tables, tmp_path, capsys):
    config, _ = whole
    arguments = ["--task", "summarize", "--checkpoint", config.workdir, "--output", str(tmp_path / "out.json")]
    assert eval_program.main([*arguments, "--path", str(tables / "dev.jsonl"), "--beams", "2"]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert record["examples"] == len(lines) == 11 and record["generation"]["beams"] == 2
    values = text_measures(
        [line["text"] for line in lines], [line["reference"] for line in lines], read_settings(config.workdir).data
    )
    assert {name: record[name] for name in values} == values
    assert "11 examples" in capsys.readouterr().out
    assert eval_program.main([*arguments, "--limit", "3", "--draft", "lookup"]) == 0
    guessed = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert eval_program.main([*arguments, "--limit", "3"]) == 0
    assert guessed == [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    capsys.readouterr()
    assert eval_program.main([*arguments, "--beams", "2", "--draft", "lookup"]) == 2
    assert "beams=2 gives the best text alone" in capsys.readouterr().err
    assert eval_program.main([*arguments, "--beams", "0"]) == 2
    assert "--beams: must lie between 1 and 1024, but is 0" in capsys.readouterr().err


def test_killed_it_goes_on_bit_for_bit(whole, tables, tmp_path, monkeypatch):
    def kill():
        raise Killed

    config = make(tables, tmp_path / "run")
    with monkeypatch.context() as patch:
        call_at(patch, 13, kill)
        with pytest.raises(Killed):
            train(config, lambda line: None)
    lines = []
    assert not train(config, lines.append).interrupted
    assert any("resumed from the checkpoint of step 8" in line for line in lines)
    assert final_state(read_settings(config.workdir)) == final_state(read_settings(whole[0].workdir))
    assert curve(config) == curve(whole[0])


def test_a_mesh_of_all_kinds_gives_the_same_losses(whole, tables, tmp_path):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    steps = TrainConfig(steps=4, log_every=4, evaluate_batches=0)
    train(make(tables, tmp_path / "run", mesh=mesh, train=steps), lambda line: None)
    lines = read_metrics(tmp_path / "run/metrics.jsonl"), read_metrics(Path(whole[0].workdir, "metrics.jsonl"))
    first = [[line["loss"] for line in found if "loss" in line][:1] for found in lines]
    np.testing.assert_allclose(*first, rtol=1e-5)
    assert "rouge1" in lines[0][-1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=gpt2", "seq2seq cannot be done by gpt2; models that can: t5"),
        ("data.source=stdlib", "needs sources and targets, but data.source is stdlib"),
        ("data.target_field=", "data.target_field is empty"),
        ("data.target_field=body", "has no column 'body'; set data.text_field and data.target_field"),
        ("model.vocabulary_size=64", "the vocabulary of data.tokenizer=bytes"),
        ("optimizer.warmup_steps=24", "must be smaller than the 24 steps of train.epochs=3"),
        ("mesh.sequence=2", "cuts rows, which t5 needs whole"),
        ("finetune.beams=0", "beams must be greater than 0, but is 0"),
        ("finetune.label_smoothing=1", "label_smoothing must lie in [0, 1), but is 1"),
    ],
)
def test_what_cannot_be_done_is_refused(tables, tmp_path, override, message):
    with pytest.raises(ConfigError) as error:
        config = apply_overrides(make(tables, tmp_path / "run"), [f"--config.{override}"])
        train(config, lambda line: None)
    assert message in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"article": "a"}', "summary is no text, but None"),
        ('{"article": "a", "summary": 3}', "summary is no text, but 3"),
        ("", "has no rows"),
    ],
)
def test_tables_that_hold_no_pairs_are_refused(tables, tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text('{"article": "a", "summary": "one"}\n' * bool(line) + line + "\n")
    config = apply_overrides(make(tables, tmp_path / "run"), [f"--config.data.path={tmp_path / 'bad.jsonl'}"])
    with pytest.raises(ConfigError, match=message):
        train(config, lambda line: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("override", ["finetune.objective=language_model", "finetune.objective=medusa"])
def test_rows_of_text_are_not_for_models_of_sources(override, whole, tmp_path):
    told = [f"--config.{override}", "--config.model=t5", f"--config.finetune.checkpoint={whole[0].workdir}"]
    with pytest.raises(ConfigError, match="cannot be done by t5; models that can: flash, llama, gpt2"):
        train(apply_overrides(Config(workdir=str(tmp_path / "run")), told), lambda line: None)
    assert not (tmp_path / "run").exists()


GLUE_ROWS = {
    "SST-2": "sentence\tlabel\n" + "it is good\t1\nit is bad\t0\n" * 6,
    "MNLI": "sentence1\tsentence2\tgold_label\n" + "A man\tsleeps\tneutral\nHe sits\tHe sits\tentailment\n" * 6,
    "STS-B": "sentence1\tsentence2\tscore\n" + "a\tb\t1.29\nc\tc\t5.0\n" * 6,
}


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    root = tmp_path_factory.mktemp("glue")
    for name, rows in GLUE_ROWS.items():
        (root / name).mkdir()
        for file in ("train", "dev") if name != "MNLI" else ("train", "dev_matched", "dev_mismatched"):
            (root / name / f"{file}.tsv").write_text(rows)
    return root


@pytest.mark.parametrize(
    ("task", "source", "target"),
    [
        ("sst2", "sst2 sentence: it is good", "positive"),
        ("mnli", "mnli hypothesis: sleeps premise: A man", "neutral"),
        ("stsb", "stsb sentence1: a sentence2: b", "1.2"),
    ],
)
def test_glue_is_text_to_text(glue, task, source, target):
    """As T5 was trained with it."""
    pairs = open_pairs(DataConfig(source="glue", task=task, path=(str(glue),)), "train")
    assert (pairs.first[0], pairs.second[0]) == (source, target)


def test_written_classes_are_measured(glue, tables, tmp_path):
    data = DataConfig(source="glue", task="mnli", path=(str(glue),), sequence_length=64, target_length=12)
    found = text_measures(["neutral", " neutral", "what", "entailment"], ["neutral"] * 3 + ["entailment"], data)
    assert found["accuracy"] == 0.75
    numbers = text_measures(
        ["1.0", "x", "3.0", "inf"], ["1.0", "0.0", "3.2", "0.2"], dataclasses.replace(data, task="stsb")
    )
    np.testing.assert_allclose(numbers["pearson"], np.corrcoef([1, 0, 3, 0], [1, 0, 3.2, 0.2])[0, 1])
    config = make(tables, tmp_path / "run", data=data, train=TrainConfig(steps=2, evaluate_batches=1))
    lines = []
    train(config, lines.append)
    last = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert {"accuracy", "mismatched_accuracy", "mismatched_validation_loss"} <= last.keys()


def test_a_tokenizer_is_learned_from_sources_and_targets(tables, tmp_path):
    config = make(tables, tmp_path / "run", train=TrainConfig(steps=1, evaluate_batches=1))
    config = apply_overrides(config, ["--config.data.tokenizer=train", "--config.data.tokenizer_vocabulary=270"])
    config = apply_overrides(config, ["--config.model.vocabulary_size=270"])
    train(config, lambda line: None)
    _, tokenizer = load_model(config.workdir)[:2]
    assert tokenizer.vocabulary_size == 270 and len(tokenizer.encode("one")) < 3
