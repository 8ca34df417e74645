"""What is added from outside: here alone are a task and what it needs; no other file knows of them."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.data.pipeline import validation_batches
from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    FinetuneConfig,
    FlashConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from lin_jax.layers.linear import Linear
from lin_jax.models.flops import head_flops, layer_flops
from lin_jax.settings.base import require
from lin_jax.tasks.base import BatchField, ResultFile
from lin_jax.tasks.loss import LossSums
from lin_jax.tasks.registry import TASKS
from lin_jax.tasks.text import TextTask
from lin_jax.train import loop
from lin_jax.train.loop import train
from lin_jax.train.metrics import read_metrics
from lin_jax.train.saved_model import load_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

# A task: whether the next token is even, by a layer of its own; two validation sets, of which one is shifted by hand.


def add_even(row):
    return {**row, "even": row["targets"] % 2 == 0, "first": row["tokens"][0]}


class Parity(TextTask):
    """Whether the next token is even. Its highest accuracy is the best."""

    best_by = "accuracy"
    higher_is_better = True
    validation_sets = ("", "again")
    adds = ("parity",)

    def check(self):
        super().check()
        vocabulary = self.config.model.vocabulary_size
        require(vocabulary > 2, f"model.vocabulary_size={vocabulary} leaves nothing to guess: give more than 2")

    def batch_fields(self):
        rows, length = self.config.data.batch_size, self.config.data.sequence_length
        even = BatchField((rows, length), ("batch", "tokens"), np.bool_)
        text = {name: field for name, field in super().batch_fields().items() if name != "targets"}
        return {**text, "even": even, "first": BatchField((rows,), ("batch",), np.int32)}

    def make_rows(self, rows):
        return rows.map(add_even)

    def extend(self, model, rngs):
        model.parity = Linear(self.config.model.width, 1, ("width", None), rngs=rngs)

    def _logits(self, structure, partition, trained, frozen, constants, batch):
        model = structure.model(trained, frozen, constants, partition)
        return model.parity(self.features(model, batch, partition))[..., 0].astype(jnp.float32)

    def loss(self, structure, partition):
        def loss(trained, frozen, constants, batch):
            logits_BT = self._logits(structure, partition, trained, frozen, constants, batch)
            nll_BT = jax.nn.softplus(jnp.where(batch["even"], -logits_BT, logits_BT))
            nll = jnp.sum(nll_BT * batch["weights"])
            return LossSums(nll, nll, jnp.sum(batch["weights"]))

        return loss

    def flops(self, trains, *, tiled):
        model, lora = self.config.model, self.config.finetune.lora
        layers = layer_flops(model, self.config.data.sequence_length, lora, trains, tiled=tiled)
        return layers + head_flops(dataclasses.replace(model, vocabulary_size=1), trains, True)

    def evaluation(self, structure, partition):
        def evaluate(trained, frozen, constants, batch):
            right = (self._logits(structure, partition, trained, frozen, constants, batch) > 0) == batch["even"]
            firsts = jnp.bincount(batch["first"], length=self.config.model.vocabulary_size)
            return {"right": jnp.sum(right * batch["weights"]), "all": jnp.sum(batch["weights"]), "firsts": firsts}

        return evaluate

    def values(self, sums, tokenizer):
        return {"accuracy": float(sums["right"] / sums["all"]), "rows": float(sums["firsts"].sum())}

    def describe(self, values):
        return f"{values['accuracy']:.1%} right"

    def measure(self, validation):
        """One measure more, of what the model says of a text by itself."""
        model = validation.model()
        says = model.parity(model.features(jnp.asarray(validation.tokenizer.encode("1 and"))[None]))[0, -1, 0]
        return super().measure(validation) | {"says": float(says)}

    def results(self, values, validation):
        return [ResultFile("predictions.json", json.dumps({"says": values["says"]}), "what it says")]


@pytest.fixture(scope="module", autouse=True)
def registered():
    TASKS.register("parity", Parity)
    yield
    del TASKS._entries["parity"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    text = directory / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} and {n + 1} are {2 * n + 1}. " * 4}) + "\n" for n in range(80)))

    def make(workdir, **fields):
        given = {
            "model": FlashConfig(
                vocabulary_size=257,
                width=16,
                depth=2,
                query_key_size=8,
                rotary_size=4,
                attention=AugmentedConfig(group_size=8, convolution=4),
            ),
            "data": DataConfig(
                source="text",
                path=(str(text),),
                cache_directory=str(directory / "cache"),
                sequence_length=32,
                batch_size=16,
            ),
            "optimizer": OptimizerConfig(peak_learning_rate=1e-2, schedule="constant"),
            "train": TrainConfig(steps=20, microbatches=2, log_every=2, evaluate_every=4, evaluate_batches=2),
            "checkpoint": CheckpointConfig(every=4, keep=1),
            "finetune": FinetuneConfig(objective="parity"),
            "mesh": MeshConfig(data=2, fsdp=4),
        }
        return Config(workdir=str(workdir), **{**given, **fields})

    return make


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run of the task that nothing happens to, and what it said."""
    config, lines = settings(tmp_path_factory.mktemp("parity") / "run"), []
    assert not train(config, lines.append).interrupted
    return config, lines


def metrics(config):
    timed = ("step_seconds", "tokens_per_second", "mfu")
    lines = read_metrics(Path(config.workdir, "metrics.jsonl"))
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def parameters(config):
    return jax.device_get(nnx.to_pure_dict(nnx.state(load_model(config.workdir)[0], nnx.Param)))


def test_a_task_learns_and_says_so(whole):
    config, lines = whole
    measured = [line for line in metrics(config) if "accuracy" in line]
    assert [line["step"] for line in measured] == [4, 8, 12, 16, 20]
    assert measured[-1]["accuracy"] == measured[-1]["again_accuracy"] > measured[0]["accuracy"] > 0.4
    assert any(line.endswith(f"{measured[-1]['accuracy']:.1%} right") for line in lines)
    assert any("predictions.json: what it says" in line for line in lines)
    assert json.loads(Path(config.workdir, "predictions.json").read_text()) == {"says": measured[-1]["says"]}


def test_the_best_checkpoint_is_the_one_with_the_highest_measure(settings, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.8, 0.7, 0.6])
    monkeypatch.setattr(Parity, "measure", lambda self, validation: {"accuracy": next(accuracies), "says": 0.0})
    config = settings(tmp_path / "run")
    train(config, lambda line: None)
    kept = {int(path.name) for path in Path(config.workdir, "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {8, 20}


def test_its_measures_are_those_of_the_saved_model(whole):
    config, _ = whole
    model, tokenizer, _ = load_model(config.workdir)
    right = total = rows = 0
    for number, batch in enumerate(validation_batches(config.data, tokenizer)):
        if number == config.train.evaluate_batches:
            break
        says_even = np.asarray(model.parity(model.features(jnp.asarray(batch["tokens"]))))[..., 0] > 0
        right += ((says_even == (batch["targets"] % 2 == 0)) * batch["weights"]).sum()
        total, rows = total + batch["weights"].sum(), rows + len(batch["tokens"])
    last = metrics(config)[-1]
    # A sum in another order may turn a logit that is all but 0.
    np.testing.assert_allclose(last["accuracy"], right / total, atol=2 / total)
    assert last["rows"] == rows


def test_a_task_goes_on_bit_for_bit(whole, settings, tmp_path, monkeypatch):
    class Killed(BaseException):
        """Stands for the end of the process."""

    original = loop.MetricsLog.add

    def add(self, step, values):
        if step == 11:
            raise Killed
        original(self, step, values)

    config, lines = settings(tmp_path / "run"), []
    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricsLog, "add", add)
        with pytest.raises(Killed):
            train(config, lines.append)
    train(config, lines.append)
    assert any("resumed from the checkpoint of step 8" in line for line in lines)
    assert metrics(config) == metrics(whole[0])
    jax.tree.map(np.testing.assert_array_equal, parameters(config), parameters(whole[0]))


def test_on_another_mesh_a_task_learns_the_same(whole, settings, tmp_path):
    config = settings(tmp_path / "run", mesh=MeshConfig(data=8), train=TrainConfig(steps=4, evaluate_batches=1))
    train(config, lambda line: None)
    losses, expected = ([line["loss"] for line in metrics(c) if "loss" in line][:4] for c in (config, whole[0]))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_what_a_task_cannot_do_is_told_in_a_line(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"^model\.vocabulary_size=2 leaves nothing to guess: give more than 2$"):
        settings(tmp_path / "run", model=FlashConfig(vocabulary_size=2))
    with pytest.raises(ConfigError, match=r"unknown objective 'paritty'; did you mean parity\?"):
        settings(tmp_path / "run", finetune=FinetuneConfig(objective="paritty"))
    with pytest.raises(ValueError, match="objective 'parity' already"):
        TASKS.register("parity", Parity)
