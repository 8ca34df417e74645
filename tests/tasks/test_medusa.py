"""Medusa heads: their loss and accuracy against loops over tokens, what trains, and a run from start to generation."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lin_jax
from lin_jax.convert.medusa import read_heads
from lin_jax.convert.program import convert
from lin_jax.data.tokenizers import BytesTokenizer
from lin_jax.decode.generate import generate_tokens
from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    GenerateConfig,
    LlamaConfig,
    LoraConfig,
    MedusaConfig,
    MedusaFinetuneConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.models.registry import create_model
from lin_jax.settings.command_line import apply_overrides
from lin_jax.tasks.medusa import MedusaTraining, accuracy_by_rank, head_values
from lin_jax.train.loop import train
from lin_jax.train.metrics import read_metrics
from lin_jax.train.saved_model import load_model, save_model
from lin_jax.train.sharding import make_partition
from lin_jax.train.trainable import structure_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = LlamaConfig(
    vocabulary_size=257,
    width=16,
    depth=2,
    heads=2,
    key_value_heads=1,
    head_size=8,
    feed_forward_size=24,
    attention=AugmentedConfig(local="softmax", group_size=4, convolution=3),
)
HEADS = MedusaFinetuneConfig(checkpoint="set below", train=(), medusa=MedusaConfig(heads=3))
WEIGHTED = MedusaConfig(heads=3, weight=0.3)
JOINT = dataclasses.replace(HEADS, train=("norm",), lora=LoraConfig(rank=2))
STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that was not trained here, far enough from its start that its attention matters."""
    directory = str(tmp_path_factory.mktemp("base") / "run")
    _, parameters = nnx.split(create_model(MODEL, nnx.Rngs(7)))
    loud = jax.tree.map(lambda x: 3 * x, nnx.to_pure_dict(parameters))
    save_model(directory, loud, Config(model=MODEL), BytesTokenizer())
    return directory


@pytest.fixture(scope="module")
def settings(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    text = directory / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} and {n + 1} are {2 * n + 1}. " * 4}) + "\n" for n in range(60)))

    def make(workdir, finetune=HEADS, **fields):
        given = {
            "model": MODEL,
            "data": DataConfig(
                source="text",
                path=(str(text),),
                cache_directory=str(directory / "cache"),
                tokenizer="checkpoint",
                sequence_length=32,
                batch_size=8,
                packing="segments",
            ),
            "optimizer": OptimizerConfig(peak_learning_rate=1e-2, schedule="constant"),
            "train": TrainConfig(steps=STEPS, log_every=2, evaluate_every=STEPS, evaluate_batches=2),
            "checkpoint": CheckpointConfig(every=3, keep=5),
        }
        return Config(
            workdir=str(workdir), finetune=dataclasses.replace(finetune, checkpoint=base), **{**given, **fields}
        )

    return make


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A whole run of heads, the model frozen, and what it said."""
    config, lines = settings(tmp_path_factory.mktemp("heads") / "run"), []
    train(config, report=lines.append)
    return config, lines


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "tokens": jnp.asarray(rng.integers(0, 257, (8, 12)), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, 257, (8, 12)), jnp.int32),
        "weights": jnp.asarray(rng.integers(0, 2, (8, 12)), jnp.float32),
        "segment_ids": jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3] * 8, jnp.int32),
    }


def start(config):
    """The structure, and its parameters made noisy: trained, frozen, constants."""
    structure = structure_of(config)
    parameters, constants = structure.initialise(jnp.uint32(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    noisy = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), parameters)
    return structure, *structure.split(noisy), constants


def mesh():
    return make_partition(MeshConfig(), jax.devices()[:1])


def by_hand(structure, trained, frozen, constants, batch):
    """Losses of the next tokens, and of each head the losses and ranks of its targets, token by token."""
    model = structure.merge(structure.join(trained, frozen), constants)
    x = model.features(batch["tokens"], batch["segment_ids"])
    log_p, heads = jax.nn.log_softmax(model.head(x)), np.asarray(jax.nn.log_softmax(model.medusa(x)))
    targets, weights, ids = (np.asarray(batch[name]) for name in ("targets", "weights", "segment_ids"))
    own = -(np.take_along_axis(np.asarray(log_p), targets[..., None], -1)[..., 0] * weights).sum()
    found = []
    for k in range(1, 4):
        places = [(b, t) for b in range(8) for t in range(12 - k) if weights[b, t + k] and ids[b, t] == ids[b, t + k]]
        guesses = [(heads[b, t, k - 1], targets[b, t + k]) for b, t in places]
        found.append([(-log_p[target], int((log_p > log_p[target]).sum())) for log_p, target in guesses])
    return own, found


@pytest.mark.parametrize("heads_weight", [None, 0.3])
def test_the_loss_is_that_of_the_tokens_that_heads_guess(settings, batch, heads_weight):
    config = settings("unused", HEADS if heads_weight is None else dataclasses.replace(JOINT, medusa=WEIGHTED))
    parts = start(config)
    own, found = by_hand(*parts, batch)
    of_heads = sum(0.8**k * sum(loss for loss, _ in of_head) for k, of_head in enumerate(found, start=1))
    sums = MedusaTraining(config).loss(parts[0], mesh())(*parts[1:], batch, None)
    expected = of_heads if heads_weight is None else own + heads_weight * of_heads
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-5)
    np.testing.assert_allclose(sums.weight, batch["weights"].sum())


def test_the_accuracy_counts_the_ranks_of_what_was_right(settings, batch):
    config = settings("unused")
    parts = start(config)
    own, found = by_hand(*parts, batch)
    sums = MedusaTraining(config).evaluation(parts[0], mesh())(*parts[1:], batch)
    np.testing.assert_allclose(sums.nll, own, rtol=1e-5)
    twice = jax.tree.map(lambda x: 2 * np.asarray(x, np.float64), sums)
    table = np.array(accuracy_by_rank(head_values(twice)))
    expected = [[np.mean([rank == r for _, rank in of_head]) for r in range(10)] for of_head in found]
    np.testing.assert_allclose(table, expected, atol=1e-6)
    assert np.sum(expected) > 0


@pytest.mark.parametrize("finetune", [HEADS, JOINT], ids=["heads", "joint"])
def test_the_gradient_reaches_what_trains_alone(settings, batch, finetune):
    config = settings("unused", finetune)
    structure, trained, frozen, constants = start(config)
    loss = MedusaTraining(config).loss(structure, mesh())
    gradient = jax.grad(lambda trained: loss(trained, frozen, constants, batch, None).loss)(trained)
    flat = nnx.traversals.flatten_mapping(gradient)
    reached = {path[0] if path[0] == "medusa" else path[-1] for path, leaf in flat.items() if jnp.any(leaf != 0)}
    assert reached == ({"medusa", "a", "b", "weight"} if finetune.trains_model else {"medusa"})


def test_a_run_of_heads_holds_heads_alone_and_leaves_the_model(finished, base):
    config, lines = finished
    model, _, _ = load_model(config.workdir)
    before = {name: np.asarray(x) for name, x in parameters_by_path(load_model(base)[0]).items()}
    for name, array in parameters_by_path(model).items():
        if not name.startswith("medusa."):
            np.testing.assert_array_equal(array, before[name], err_msg=name)
    saved = nnx.traversals.flatten_mapping(structure_of(config).split(structure_of(config).metadata("decay"))[0])
    assert {path[0] for path in saved} == {"medusa"}
    assert np.abs(np.asarray(model.medusa.heads.blocks["0"].kernel[...])).max() > 1e-3
    files = Path(config.workdir, "checkpoints", str(STEPS), "model")
    assert "embedding" not in (files / "_METADATA").read_text() and "medusa" in (files / "_METADATA").read_text()
    first = [line for line in read_metrics(Path(config.workdir) / "metrics.jsonl") if "objective" in line]
    assert first[-1]["objective"] < first[0]["objective"]
    assert first[-1]["validation_loss"] == first[0]["validation_loss"]
    assert any("heads right" in line for line in lines) and any("tree.json: a tree of" in line for line in lines)


def test_heads_start_as_the_models_own_head(settings, tmp_path, base):
    config = settings(tmp_path / "run", optimizer=OptimizerConfig(peak_learning_rate=1e-12, weight_decay=0.0))
    train(dataclasses.replace(config, train=TrainConfig(steps=1, evaluate_batches=1)))
    model, _, _ = load_model(config.workdir)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16)), jnp.float32)
    np.testing.assert_allclose(model.medusa(x), np.repeat(np.asarray(model.head(x))[:, None], 3, 1), atol=1e-4)


def test_a_run_that_was_cut_goes_on_exactly(finished, tmp_path):
    config, _ = finished
    workdir = tmp_path / "run"
    shutil.copytree(config.workdir, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    train(dataclasses.replace(config, workdir=str(workdir)))
    again, whole = (parameters_by_path(load_model(str(path))[0]) for path in (workdir, config.workdir))
    for name, array in whole.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_generation_with_the_run_and_its_tree_is_greedy(finished):
    config, _ = finished
    model, _ = lin_jax.load(config.workdir)
    prompts = [np.frombuffer(b"3 and 4 are ", np.uint8).astype(np.int32), np.array([50], np.int32)]
    tree = str(Path(config.workdir) / "tree.json")
    plain, guessed = (
        generate_tokens(
            model, GenerateConfig(max_new_tokens=20, block=4, draft=draft, tree=tree), prompts, heads=model.medusa
        )
        for draft in ("none", "medusa")
    )
    for a, b in zip(plain, guessed, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_the_heads_of_a_run_can_be_taken_elsewhere(finished, tmp_path):
    config, _ = finished
    model, _ = lin_jax.load(config.workdir)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16)), jnp.float32)
    convert(config.workdir, tmp_path / "hf", to="hf", report=lambda line: None)
    np.testing.assert_array_equal(read_heads(tmp_path / "hf" / "medusa_lm_head.safetensors")(x), model.medusa(x))
    convert(str(tmp_path / "hf"), tmp_path / "run", tokenizer="bytes", report=lambda line: None)
    np.testing.assert_array_equal(lin_jax.load(tmp_path / "run")[0].medusa(x), model.medusa(x))


def test_both_train_from_a_run_of_heads(finished, settings, tmp_path):
    config, _ = finished
    joint = dataclasses.replace(
        settings(tmp_path / "joint"), finetune=dataclasses.replace(JOINT, checkpoint=config.workdir)
    )
    train(dataclasses.replace(joint, train=TrainConfig(steps=2, evaluate_every=2, evaluate_batches=1)))
    lines = [line for line in read_metrics(tmp_path / "joint" / "metrics.jsonl") if "objective" in line]
    before = [line for line in read_metrics(Path(config.workdir) / "metrics.jsonl") if "objective" in line]
    # It starts with the heads of the run, not with new ones.
    np.testing.assert_allclose(lines[0]["head_1_top_10"], before[-1]["head_1_top_10"], atol=0.1)
    assert lines[0]["head_1_top_10"] > before[0]["head_1_top_10"]
    names = parameters_by_path(load_model(str(tmp_path / "joint"))[0])
    assert any("adapter" in name for name in names) and any(name.startswith("medusa.") for name in names)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["finetune.objective=language_model", "finetune.medusa.heads=2"],
            r"config\.finetune\.medusa is a setting of objective=medusa, but config\.finetune\.objective is language",
        ),
        (["finetune.medusa.heads=0"], "heads must be greater than 0"),
        (["finetune.medusa.tree_nodes=1"], "tree_nodes must be 2 or more"),
        (["finetune.checkpoint="], "give the run to start from"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, overrides, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(settings("unused"), [f"--config.{text}" for text in overrides])


def test_heads_are_not_trained_on_another_attention(settings, tmp_path):
    other = dataclasses.replace(MODEL, attention=dataclasses.replace(MODEL.attention, group_size=8))
    with pytest.raises(ConfigError, match="attention.group_size is 8, but the model in .* has 4"):
        train(settings(tmp_path / "run", model=other))
    assert not (tmp_path / "run").exists()
