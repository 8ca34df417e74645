"""Runs that start from a model: what trains, what is saved, and that a run goes on exactly."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from lin_jax.convert.hugging_face import ModelWeights, Placement
from lin_jax.convert.program import convert
from lin_jax.convert.source import Input, read_source
from lin_jax.data.tokenizers import BytesTokenizer
from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    FinetuneConfig,
    FlashConfig,
    Gpt2Config,
    LlamaConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    SoftmaxConfig,
    TrainConfig,
    TransferFinetuneConfig,
)
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.models.registry import create_model
from lin_jax.plan import plan
from lin_jax.settings.command_line import apply_overrides
from lin_jax.train.loop import train
from lin_jax.train.metrics import read_metrics
from lin_jax.train.saved_model import load_model, save_model
from lin_jax.train.sharding import make_mesh
from lin_jax.train.trainable import structure_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

SOFTMAX = SoftmaxConfig()
LINEAR = AugmentedConfig(local="softmax", group_size=4, convolution=3)
MODEL = LlamaConfig(
    vocabulary_size=257, width=16, depth=2, heads=2, key_value_heads=1, head_size=8, feed_forward_size=24
)
LORA = FinetuneConfig(checkpoint="set below", train=("new", "norm"), lora=LoraConfig(rank=2), frozen_dtype="bfloat16")
STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A softmax model that was not trained here."""
    directory = str(tmp_path_factory.mktemp("base") / "run")
    model = create_model(dataclasses.replace(MODEL, attention=SOFTMAX), nnx.Rngs(7))
    _, parameters = nnx.split(model)
    save_model(directory, nnx.to_pure_dict(parameters), Config(model=model.config), BytesTokenizer())
    kept = Path(directory) / "tokenizer" / "hugging_face"
    kept.mkdir()
    (kept / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture(scope="module")
def settings(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    text = directory / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} and {n + 1} are {2 * n + 1}. " * 4}) + "\n" for n in range(60)))

    def make(workdir, finetune=LORA, **fields):
        finetune = dataclasses.replace(finetune, checkpoint=base)
        given = {
            "model": dataclasses.replace(MODEL, attention=LINEAR),
            "data": DataConfig(
                source="text",
                path=(str(text),),
                cache_directory=str(directory / "cache"),
                tokenizer="checkpoint",
                sequence_length=16,
                batch_size=8,
            ),
            "optimizer": OptimizerConfig(peak_learning_rate=1e-2, schedule="constant"),
            "train": TrainConfig(steps=STEPS, log_every=2, evaluate_every=STEPS, evaluate_batches=2),
            "checkpoint": CheckpointConfig(every=3, keep=5),
        }
        return Config(workdir=str(workdir), finetune=finetune, **{**given, **fields})

    return make


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A whole run with adapters."""
    config = settings(tmp_path_factory.mktemp("lora") / "run")
    train(config)
    return config


def arrays(path):
    return {name: np.asarray(array) for name, array in parameters_by_path(load_model(path)[0]).items()}


def test_only_what_is_named_trains_and_the_rest_is_the_base(finished, base):
    before, after = arrays(base), arrays(finished.workdir)
    for name, array in after.items():
        trained = "adapter" in name or "norm" in name or name.endswith(("alpha", "filter"))
        if trained and name in before:
            assert np.abs(array - before[name]).max() > 1e-4, name
        elif trained:
            assert np.abs(array).max() > 1e-4, name
        else:
            np.testing.assert_array_equal(array, before[name].astype(jnp.bfloat16), err_msg=name)
    losses = [line["loss"] for line in read_metrics(metrics_of(finished)) if "loss" in line]
    assert losses[-1] < losses[0]


def test_the_tokenizers_files_come_along(finished):
    kept = Path(finished.workdir) / "tokenizer" / "hugging_face"
    assert (kept / "chat_template.jinja").read_text() == "{{ messages }}"


def metrics_of(config):
    return Path(config.workdir) / "metrics.jsonl"


def test_a_checkpoint_holds_what_trains_alone(finished):
    metadata = ocp.StandardCheckpointer().metadata(f"{finished.workdir}/checkpoints/{STEPS}/model").item_metadata.tree
    saved = {".".join(path) for path in nnx.traversals.flatten_mapping(metadata["parameters"])}
    structure = structure_of(finished)
    trained, frozen = structure.split(structure.metadata("decay"))
    assert saved == {".".join(path) for path in nnx.traversals.flatten_mapping(trained)}
    assert not any(name.endswith("kernel") or name == "embedding" for name in saved)
    assert nnx.traversals.flatten_mapping(frozen).keys() >= {("embedding",), ("layers", "attention", "query", "kernel")}


def test_a_run_goes_on_bit_for_bit(finished, settings, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(f"{finished.workdir}/checkpoints/3", workdir / "checkpoints" / "3")
    shutil.copytree(f"{finished.workdir}/tokenizer", workdir / "tokenizer")
    train(settings(workdir))
    jax.tree.map(np.testing.assert_array_equal, arrays(str(workdir)), arrays(finished.workdir))


def test_another_base_is_refused(finished, settings, tmp_path):
    workdir, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished.workdir, workdir)
    model = create_model(dataclasses.replace(MODEL, attention=SOFTMAX), nnx.Rngs(8))
    save_model(str(other), nnx.to_pure_dict(nnx.split(model)[1]), Config(model=model.config), BytesTokenizer())
    config = settings(workdir, train=TrainConfig(steps=STEPS + 1))
    moved = dataclasses.replace(config.finetune, checkpoint=str(other))
    with pytest.raises(ConfigError, match="are not those that the run in"):
        train(dataclasses.replace(config, finetune=moved))
    with pytest.raises(ConfigError, match=r"config\.finetune\.lora\.rank is 3, but the checkpoints in .* with 2"):
        train(dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, lora=LoraConfig(rank=3))))


def test_a_base_that_is_gone_is_told(finished, tmp_path, base):
    hidden = tmp_path / "hidden"
    shutil.move(base, hidden)
    try:
        with pytest.raises(ConfigError, match=r"finetune\.checkpoint: .* does not exist"):
            load_model(finished.workdir)
    finally:
        shutil.move(hidden, base)


def test_the_next_stage_starts_from_the_merged_model(finished, settings, tmp_path):
    """Two stages: the second run's first loss is the first run's last validation, on the same text."""
    first = settings(
        tmp_path / "transfer",
        TransferFinetuneConfig(checkpoint="set below", train=("attention",)),
    )
    train(first)
    errors = [line["loss"] for line in read_metrics(metrics_of(first)) if "loss" in line]
    assert errors[-1] < errors[0]
    second = settings(tmp_path / "second")
    second = dataclasses.replace(second, finetune=dataclasses.replace(second.finetune, checkpoint=finished.workdir))
    train(dataclasses.replace(second, train=TrainConfig(steps=1, evaluate_batches=2)))
    last, first = (
        next(
            line["validation_loss"]
            for line in read_metrics(metrics_of(run))
            if line["step"] == step and "perplexity" in line
        )
        for run, step in ((finished, STEPS), (second, 0))
    )
    np.testing.assert_allclose(
        first, last, rtol=1e-3
    )  # adapters are rounded to bfloat16 with what they are merged into
    merged = arrays(str(tmp_path / "second"))["layers.attention.query.kernel"]
    own = arrays(finished.workdir)
    start = own["layers.attention.query.kernel"].astype(np.float32) + 8.0 * (
        own["layers.attention.query.adapter.a"] @ own["layers.attention.query.adapter.b"]
    )
    np.testing.assert_allclose(merged.astype(np.float32), start, rtol=1e-2)  # held in bfloat16


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width=32", r"config\.model\.width is 32, but the model in finetune\.checkpoint=.* has 16"),
        ("finetune.checkpoint=nowhere", r"finetune\.checkpoint: .*nowhere does not exist"),
        ("finetune.lora.targets=q_proj", r"no projection q_proj; there are down, gate, key"),
        ("finetune.train=all", r"train=all leaves nothing for adapters"),
        ("finetune.lora.rank=-1", r"config\.finetune\.lora\.rank must be 0 or more"),
        ("finetune.objective=attention_transfer", r"does not suit objective=attention_transfer"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(settings, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        train(apply_overrides(settings(tmp_path / "run"), [f"--config.{override}"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("finetune", "message"),
    [
        ({"train": ("new",)}, "checkpoint is empty, but random parameters must all train"),
        ({"lora": LoraConfig(rank=2), "train": ("norm",)}, "checkpoint is empty"),
        ({"checkpoint": "x", "train": ()}, "nothing to train"),
    ],
)
def test_settings_that_contradict_each_other(finetune, message):
    with pytest.raises(ConfigError, match=message):
        Config(finetune=FinetuneConfig(**finetune))


def test_transfer_is_for_linearized_models():
    finetune = TransferFinetuneConfig(checkpoint="x", train=("new",))
    for model in (FlashConfig(), dataclasses.replace(MODEL, attention=SOFTMAX)):
        with pytest.raises(ConfigError, match="attention_transfer is for linearized LLaMA and GPT-2"):
            Config(model=model, finetune=finetune)


GROUP_SIZES = [
    (MODEL, "embedding", {"embedding"}),
    (MODEL, "norm", {"norm.weight", "layers.attention_norm.weight", "layers.feed_forward_norm.weight"}),
    (MODEL, "new", {"layers.attention.mixing.alpha", "layers.attention.mixing.filter"}),
    (MODEL, "head", {"logits.kernel"}),
    (
        Gpt2Config(vocabulary_size=257, width=16, depth=2, heads=2, feed_forward_size=24, positions=32),
        "attention",
        {
            *(f"layers.{name}.{part}" for name in ("query_key_value", "output") for part in ("kernel", "bias")),
            *(f"layers.mixing.{name}" for name in ("alpha", "filter")),
        },
    ),
    (MODEL, "feed_forward", {f"layers.feed_forward.{name}.kernel" for name in ("gate", "up", "down")}),
]


@pytest.mark.parametrize(("model", "group", "expected"), GROUP_SIZES, ids=[case[1] for case in GROUP_SIZES])
def test_groups(model, group, expected):
    finetune = FinetuneConfig(checkpoint="x", train=(group,))
    structure = structure_of(Config(model=model, data=DataConfig(sequence_length=16), finetune=finetune))
    trained, frozen = structure.split(structure.metadata("decay"))
    assert {".".join(path) for path in nnx.traversals.flatten_mapping(trained)} == expected
    assert len(jax.tree.leaves(trained)) + len(jax.tree.leaves(frozen)) == len(
        jax.tree.leaves(structure.metadata("decay"))
    )


def test_a_plan_counts_what_is_trained(settings, tmp_path):
    config = settings(tmp_path / "run", plan="cpu:8")
    told = dict(line.split("  ", 1) for line in plan(config).splitlines()[1:])
    told = {name: value.strip() for name, value in told.items()}
    C, D, H, K, F, V, L = 16, 8, 2, 1, 24, 257, 2
    adapters = 2 * ((C + H * D) * 2 + (C + K * D) * 2)  # query and output, key and value, rank 2
    trained = L * (adapters + 2 * C + 1 + 3 * H) + C
    frozen = L * (C * D * (2 * H + 2 * K) + 3 * C * F) + 2 * V * C
    assert told["parameters"] == f"{trained + frozen:,}" and told["trained"] == f"{trained:,}"
    assert told["frozen parameters"] == f"{2 * frozen:,} bytes a device, {2 * frozen:,} in one copy"
    # Two moments a parameter, and the optimizer's counters: two of steps, two of skipped ones and a flag.
    moments, whole = 8 * trained, told["optimizer state"].split(" ")[0].replace(",", "")
    assert moments < int(whole) <= moments + 32


@pytest.mark.parametrize("to", ["hf", "lin_jax"])
def test_adapters_are_merged_by_a_conversion(finished, tmp_path, to):
    target = tmp_path / to
    convert(finished.workdir, target, to=to)
    weights = read_source(Input(str(target), tokenizer="bytes"), Placement(make_mesh(MeshConfig()))).weights
    model = load_model(finished.workdir)[0]
    tokens = jnp.arange(40).reshape(2, 20)
    assert not any("adapter" in name for name in weights.arrays)
    # A directory of Hugging Face names one type, that of the embedding, in which it is then computed.
    merged = ModelWeights(dataclasses.replace(weights.config, dtype="float32"), weights.arrays).model()
    np.testing.assert_allclose(merged(tokens), model(tokens), atol=1e-5)
