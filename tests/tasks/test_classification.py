"""Classification: what is learned, measured, written and refused, with a small GPT-2 on the bytes of a table."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

import eval as eval_program
import lin_jax
from lin_jax.convert.hugging_face import ModelWeights, shapes_of, write_hugging_face
from lin_jax.data.tokenizers import BytesTokenizer
from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    ClassificationFinetuneConfig,
    Config,
    ConfigError,
    DataConfig,
    Gpt2Config,
    MaskedFinetuneConfig,
    MeshConfig,
    OptimizerConfig,
    SoftmaxConfig,
    TrainConfig,
)
from lin_jax.models.registry import create_model
from lin_jax.settings.command_line import apply_overrides
from lin_jax.settings.dictionaries import section_to_dict
from lin_jax.tasks.registry import task_of
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

WORDS = {"good": ("yes", "fine"), "bad": ("no", "awful"), "odd": ("hm", "well")}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A training, a validation and a test table, whose label is in the words."""
    root, random = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    for name, count in (("train", 60), ("dev", 21), ("test", 5)):
        rows = []
        for _ in range(count):
            label = str(random.choice(list(WORDS)))
            text = " ".join(random.choice(WORDS[label], random.integers(1, 5)))
            rows.append({"text": text, "label": label} if name != "test" else {"text": text})
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def make(tables, workdir, **fields):
    given = {
        "model": Gpt2Config(
            vocabulary_size=257,
            width=16,
            depth=2,
            heads=2,
            feed_forward_size=32,
            positions=32,
            attention=SoftmaxConfig(),
        ),
        "data": DataConfig(
            source="table",
            path=(str(tables / "train.jsonl"),),
            validation_path=(str(tables / "dev.jsonl"),),
            test_path=(str(tables / "test.jsonl"),),
            sequence_length=24,
            batch_size=8,
        ),
        "optimizer": OptimizerConfig(peak_learning_rate=2e-2),
        "train": TrainConfig(epochs=3, log_every=4, evaluate_every=8, evaluate_batches=0),
        "checkpoint": CheckpointConfig(every=8, keep=2),
        "finetune": ClassificationFinetuneConfig(),
    }
    return Config(workdir=str(workdir), **{**given, **fields})


def new_weights(config):
    random = np.random.default_rng(0)
    arrays = {path: jnp.asarray(0.1 * random.normal(size=s.shape), s.dtype) for path, s in shapes_of(config).items()}
    return ModelWeights(config, arrays)


@pytest.fixture(scope="module")
def whole(tables, tmp_path_factory):
    config, lines = make(tables, tmp_path_factory.mktemp("classification") / "run"), []
    assert not train(config, lines.append).interrupted
    return config, lines


def test_classes_and_steps_are_those_of_the_data(whole):
    config, lines = whole
    saved = read_settings(config.workdir)
    assert saved.train.steps == 3 * 8 and (saved.model.labels, saved.model.label_names) == (3, ("bad", "good", "odd"))
    assert section_to_dict(completed(config)) == section_to_dict(saved)
    # A step was compiled for each length of rows as it came, the longest first.
    assert [line for line in lines if "compiled in" in line and "MiB" in line]
    assert any(line.startswith("compiled for batches of 8 x 12") for line in lines)
    found = read_metrics(Path(config.workdir, "metrics.jsonl"))
    assert all(0 < line["real_tokens"] < line["computed_tokens"] <= 8 * 24 for line in found if "loss" in line)
    assert any("examples/s" in line and "of tokens real" in line for line in lines)


def test_it_learns_and_its_measures_are_those_of_its_predictions(whole, tables):
    from sklearn import metrics

    config, lines = whole
    model, tokenizer = lin_jax.load(config.workdir)
    rows = [json.loads(line) for line in (tables / "dev.jsonl").read_text().splitlines()]
    found = lin_jax.classify(model, tokenizer, [row["text"] for row in rows], batch_size=4)
    predicted, labels = [max(row, key=row.get) for row in found], [row["label"] for row in rows]
    np.testing.assert_allclose([sum(row.values()) for row in found], 1, rtol=1e-6)
    last = read_metrics(Path(config.workdir, "metrics.jsonl"))[-1]
    assert last["accuracy"] == metrics.accuracy_score(labels, predicted) > 0.6
    np.testing.assert_allclose(last["f1"], metrics.f1_score(labels, predicted, average="macro"))
    np.testing.assert_allclose(last["matthews"], metrics.matthews_corrcoef(labels, predicted))
    nll = -np.mean([np.log(row[label]) for row, label in zip(found, labels, strict=True)])
    np.testing.assert_allclose(last["validation_loss"], nll, rtol=1e-5)
    assert any(f"accuracy {last['accuracy']:.4f}, f1" in line for line in lines)
    # Test rows without labels are predicted at the end.
    texts = [json.loads(line)["text"] for line in (tables / "test.jsonl").read_text().splitlines()]
    best = [max(row, key=row.get) for row in lin_jax.classify(model, tokenizer, texts)]
    written = Path(config.workdir, "test.tsv").read_text().splitlines()
    assert written == ["index\tprediction", *(f"{number}\t{name}" for number, name in enumerate(best))]


def test_eval_measures_a_table_and_writes_predictions(whole, tables, tmp_path, capsys):
    config, _ = whole
    arguments = ["--task", "classification", "--checkpoint", config.workdir, "--output", str(tmp_path / "out.json")]
    assert eval_program.main([*arguments, "--path", str(tables / "dev.jsonl")]) == 0
    last = read_metrics(Path(config.workdir, "metrics.jsonl"))[-1]
    found = json.loads((tmp_path / "out.json").read_text())["test"]
    assert found["examples"] == 21 and found["accuracy"] == last["accuracy"]
    np.testing.assert_allclose(found["validation_loss"], last["validation_loss"], rtol=1e-5)
    assert len((tmp_path / "out.tsv").read_text().splitlines()) == 22
    assert eval_program.main([*arguments, "--path", str(tables / "test.jsonl")]) == 0
    assert "5 examples" in capsys.readouterr().out
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "yes", "label": "unheard"}\n')
    assert eval_program.main([*arguments, "--path", str(bad)]) == 2
    assert 'bad.jsonl line 1: unknown label "unheard"' in capsys.readouterr().err


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
    config = make(tables, tmp_path / "run", mesh=mesh, train=TrainConfig(steps=4, log_every=4))
    train(config, lambda line: None)
    first = [[line["loss"] for line in curve(run) if "loss" in line][:1] for run in (config, whole[0])]
    np.testing.assert_allclose(*first, rtol=1e-5)


def test_the_gradient_is_that_of_the_plain_loss(tables, tmp_path):
    config = completed(make(tables, tmp_path))
    parts = make_parts(config, make_partition(MeshConfig(), jax.devices()[:1]))
    parameters, constants = parts.structure.initialise(jnp.uint32(0))
    tokenizer = BytesTokenizer()
    batch = {name: jnp.asarray(array) for name, array in next(parts.task.training_batches(tokenizer, range(8))).items()}
    loss = parts.task.loss(parts.structure, parts.partition)

    def plain(parameters):
        model = parts.structure.merge(parameters, constants)
        found = jax.nn.log_softmax(model.classify(batch["tokens"], batch["segment_ids"]))
        return -jnp.sum(found[jnp.arange(8), batch["labels"]] * batch["weights"])

    found, wanted = (
        jax.grad(lambda p: loss(p, {}, constants, batch, None).loss)(parameters),
        jax.grad(plain)(parameters),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, wanted)


def test_padding_on_either_side_changes_no_probability():
    config = Gpt2Config(vocabulary_size=50, width=16, depth=2, heads=2, feed_forward_size=32, positions=16, labels=3)
    model = create_model(config, nnx.Rngs(0))
    text = jnp.arange(1, 8, dtype=jnp.int32)[None]
    plain = jax.nn.softmax(model.classify(text))
    for left, right in ((0, 5), (5, 0), (3, 2)):
        tokens = jnp.pad(text, ((0, 0), (left, right)))
        real = jnp.pad(jnp.ones_like(text), ((0, 0), (left, right)))
        np.testing.assert_allclose(jax.nn.softmax(model.classify(tokens, real)), plain, atol=1e-5)


def test_numbers_are_learned_by_squared_error(tables, tmp_path):
    table = tmp_path / "numbers.tsv"
    table.write_text("text\tlabel\n" + "".join(f"{'x' * (n % 9)}y\t{n % 9 / 2}\n" for n in range(64)))
    data = DataConfig(
        source="table", path=(str(table),), label_kind="number", sequence_length=16, validation_fraction=0.3
    )
    config = make(tables, tmp_path / "run", data=data, train=TrainConfig(epochs=20.0, evaluate_every=0))
    train(config, lambda line: None)
    last = read_metrics(Path(config.workdir, "metrics.jsonl"))[-1]
    assert last["correlation"] > 0.8 and last["correlation"] == (last["pearson"] + last["spearman"]) / 2
    model, tokenizer = lin_jax.load(config.workdir)
    values = [row["value"] for row in lin_jax.classify(model, tokenizer, ["y", "xxxxxxxxy"])]
    assert values[1] > values[0] + 2


def test_a_head_starts_fresh_where_the_base_has_none_that_fits(whole, tables, tmp_path):
    pair = tmp_path / "two.tsv"
    pair.write_text("text\tlabel\n" + "yes\tgood\nno\tnot good\n" * 20)
    data = DataConfig(source="table", path=(str(pair),), sequence_length=16)
    base = {"checkpoint": whole[0].workdir}
    steps = TrainConfig(steps=1, evaluate_every=0)
    config = make(tables, tmp_path / "run", data=data, train=steps, finetune=ClassificationFinetuneConfig(**base))
    with pytest.raises(ConfigError, match="has a head of 3 classes, but the data have 2: set finetune.fresh_head"):
        train(config, lambda line: None)
    lines = []
    train(apply_overrides(config, ["--config.finetune.fresh_head=True"]), lines.append)
    assert any("new, with random values" in line and line.endswith("score.kernel") for line in lines)
    assert read_settings(config.workdir).model.label_names == ("good", "not good")
    taken = load_model(config.workdir)[0].embedding[...]
    np.testing.assert_allclose(taken, load_model(whole[0].workdir)[0].embedding[...], atol=0.05)


@pytest.mark.parametrize("base", ["run", "hugging_face"])
def test_a_bert_that_only_predicts_masked_tokens_gets_a_pooler(base, tables, tmp_path):
    """Its own head, which nothing would train any more, is left behind."""
    model = make_bert("softmax", vocabulary_size=257, positions=32, pooler=False, next_sentence=False)
    config = make(tables, tmp_path / "run", train=TrainConfig(steps=1, evaluate_every=0))
    path = tmp_path / "base"
    if base == "run":
        texts = DataConfig(source="text", path=(str(tables / "train.jsonl"),), validation_fraction=0.2)
        objective = {"finetune": MaskedFinetuneConfig(mask_token="~"), "train": config.train}
        data = dataclasses.replace(texts, sequence_length=16, batch_size=8)
        train(make(tables, path, model=model, data=data, **objective), lambda line: None)
    else:
        path.mkdir()
        write_hugging_face(path, new_weights(model), None, {})
    finetune = ClassificationFinetuneConfig(checkpoint=str(path), settings="checkpoint")
    config, lines = dataclasses.replace(config, model=model, finetune=finetune), []
    train(config, lines.append)
    assert any(line.endswith("pooler.bias, pooler.kernel, score.bias, score.kernel") for line in lines)
    found = read_settings(config.workdir).model
    assert (found.pooler, found.masked_head, found.labels) == (True, False, 3)
    assert len(lin_jax.classify(*lin_jax.load(config.workdir), ["yes", "no"])) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=flash", "classification cannot be done by flash; models that can: gpt2"),
        ("data.source=stdlib", "needs labelled examples, but data.source is stdlib"),
        ("data.sequence_length=64", "data.sequence_length=64 is more than the model's positions=32"),
        ("data.text_field=body", "has no column 'body'"),
        ("data.label_kind=number", 'the label must be a number, but is "'),
        ("model.labels=4", "a head of 4 classes, but the data have 3"),
        ("data.label_field=text", "unknown label"),
        ("optimizer.warmup_steps=24", "must be smaller than the 24 steps of train.epochs=3"),
    ],
)
def test_what_cannot_be_done_is_refused(tables, tmp_path, override, message):
    with pytest.raises(ConfigError) as error:
        config = apply_overrides(make(tables, tmp_path / "run"), [f"--config.{override}"])
        train(config, lambda line: None)
    assert message in str(error.value) and not (tmp_path / "run").exists()


def test_epochs_are_refused_where_nothing_can_be_counted():
    with pytest.raises(ConfigError, match="train.epochs=1 needs examples"):
        task_of(Config(train=TrainConfig(epochs=1.0))).check()


def test_a_hugging_face_directory_gives_settings_parameters_and_tokenizer(tables, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    config = Gpt2Config(
        vocabulary_size=300, width=16, depth=2, heads=2, feed_forward_size=24, positions=40, attention=SoftmaxConfig()
    )
    weights = new_weights(config)
    write_hugging_face(base, weights, None, {})
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({t: n for n, t in enumerate([*alphabet, "</s>"])}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')
    run = make(
        tables,
        tmp_path / "run",
        model=Gpt2Config(attention=AugmentedConfig(group_size=8)),
        data=dataclasses.replace(make(tables, "x").data, tokenizer="checkpoint"),
        train=TrainConfig(steps=1, evaluate_every=0),
        optimizer=OptimizerConfig(peak_learning_rate=1e-6),
        finetune=ClassificationFinetuneConfig(checkpoint=str(base), settings="checkpoint"),
    )
    lines = []
    train(run, lines.append)
    assert any("finetune.checkpoint has none that fit: score.kernel" in line for line in lines)
    found = read_settings(run.workdir).model
    assert (found.width, found.positions, found.labels, found.attention.kind) == (16, 40, 3, "augmented")
    model, tokenizer = lin_jax.load(run.workdir)
    np.testing.assert_allclose(model.embedding[...], weights.arrays["embedding"], atol=1e-5)
    assert tokenizer.vocabulary_size == 257
    # It goes back with the tokenizer as it came.
    kept = tmp_path / "run/tokenizer/hugging_face/tokenizer.json"
    assert kept.read_bytes() == (base / "tokenizer.json").read_bytes()
    (base / "config.json").write_text((base / "config.json").read_text().replace('"gpt2"', '"unknown"'))
    with pytest.raises(ConfigError, match="unknown architecture"):
        train(dataclasses.replace(run, workdir=str(tmp_path / "x")), lines.append)
