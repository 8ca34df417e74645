"""What is added from outside: a task, an attention, a model and a feature map; no other file knows of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lin_jax
from convert_weights import main as convert_main
from lin_jax.attentions.base import Attention, AttentionConfig, HeadSizes, OfficialName
from lin_jax.attentions.registry import ATTENTIONS, make_attention
from lin_jax.convert.conversion import Conversion, attention_entries
from lin_jax.convert.hugging_face_config import attention_from, attention_to
from lin_jax.convert.load import load
from lin_jax.convert.names import Entry, transposed
from lin_jax.data.pipeline import training_batches, validation_batches
from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    FinetuneConfig,
    FlashConfig,
    LlamaConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    load_config,
)
from lin_jax.layers.embedding import look_up
from lin_jax.layers.linear import Linear
from lin_jax.layers.norms import RMSNorm
from lin_jax.layers.parameter import constant, constants_by_path, parameter, parameters_by_path
from lin_jax.layers.partition import WHOLE
from lin_jax.layers.rows import place
from lin_jax.layers.stack import stack_layers
from lin_jax.models.base import Decoder, Matrix, ModelConfig, ResidualLayer
from lin_jax.models.flops import head_flops, layer_flops
from lin_jax.models.registry import MODELS, create_model
from lin_jax.ops.linear_attention.feature_maps import FEATURE_MAPS, FeatureMap
from lin_jax.ops.tree import chain, tree_from_paths
from lin_jax.plan import plan
from lin_jax.settings.base import require, setting, variants
from lin_jax.settings.command_line import apply_overrides
from lin_jax.tasks.base import BatchField, ResultFile
from lin_jax.tasks.language_model import LanguageModelling
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
        def loss(trained, frozen, constants, batch, key):
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


# A task with a teacher: another model, which a run made, and which only gives its opinion.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationFinetuneConfig(FinetuneConfig):
    """A model that learns from another."""

    objective: Literal["distillation"] = setting("distillation", "what is learned")
    teacher: str = setting("", "run to learn from")


class Distillation(LanguageModelling):
    """Give the distribution of the next token that the teacher gives."""

    settings = DistillationFinetuneConfig
    free_settings = ("finetune.teacher",)  # a run may move; its parameters are compared

    @property
    def teachers(self):
        return {"teacher": self.config.finetune.teacher}

    def loss(self, structure, partition):
        def loss(trained, frozen, constants, batch, key):
            model = structure.model(trained, frozen, constants, partition)
            logits_BTV = model.head(self.features(model, batch, partition))
            wanted_BTV = jax.nn.softmax(model.teacher.head(self.features(model.teacher, batch, partition)))
            nll_BT = -jnp.sum(wanted_BTV * jax.nn.log_softmax(logits_BTV), axis=-1)
            nll = jnp.sum(nll_BT * batch["weights"])
            return LossSums(nll, nll, jnp.sum(batch["weights"]))

        return loss


@pytest.fixture(scope="module", autouse=True)
def registered():
    added = {"parity": Parity, "distillation": Distillation}
    for name, task in added.items():
        TASKS.register(name, task)
    yield
    for name in added:
        del TASKS._entries[name]


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


class Killed(BaseException):
    """Stands for the end of the process."""


def train_killed(config, monkeypatch, at):
    """Train until the process ends after a step."""
    original = loop.MetricsLog.add

    def add(self, step, values):
        if step == at:
            raise Killed
        original(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricsLog, "add", add)
        with pytest.raises(Killed):
            train(config, lambda line: None)


def test_a_task_goes_on_bit_for_bit(whole, settings, tmp_path, monkeypatch):
    config, lines = settings(tmp_path / "run"), []
    train_killed(config, monkeypatch, 11)
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
    with pytest.raises(ConfigError, match='must be one of language_model, .*parity.*, but is "paritty"'):
        settings(tmp_path / "run", finetune=FinetuneConfig(objective="paritty"))
    with pytest.raises(ValueError, match="objective 'parity' already"):
        TASKS.register("parity", Parity)


# An attention: the mean over all tokens so far of (q . s k) v, with a weight per head, and signs s that never change.


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanConfig(AttentionConfig):
    """A mean over the tokens so far."""

    kind: Literal["mean"] = setting("mean", "a mean over the tokens so far")
    half: bool = setting(False, "whether outputs are halved")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanState:
    sum_BHDE: jax.Array
    length_B: jax.Array


class MeanAttention(Attention):
    settings = MeanConfig
    presets: ClassVar[dict[str, Any]] = {"half_mean": {"half": True}}

    def __init__(self, config, sizes, *, rngs):
        self.config = config
        self.weight = parameter(jnp.ones(sizes.heads), ("heads",), roles=("new", "attention"))
        signs = jax.random.rademacher(rngs.params(), (sizes.heads, sizes.head_size), jnp.float32)
        self.signs = constant(signs, ("heads", None))

    def _signed(self, k):
        return k * self.signs[...].astype(k.dtype)[None, None]

    def _of(self, q, k, v, seen_BTS, count_BT, sum_BHDE=None):
        score = jnp.einsum("bthd,bshd->bhts", q, self._signed(k))
        y = jnp.einsum("bhts,bshe->bthe", jnp.where(seen_BTS[:, None], score, 0), v)
        if sum_BHDE is not None:
            y += jnp.einsum("bthd,bhde->bthe", q, sum_BHDE)
        weight = self.weight[...][None, None, :, None] * (0.5 if self.config.half else 1.0)
        return (weight * y / count_BT[:, :, None, None]).astype(v.dtype)

    def __call__(self, q_BTHD, k_BSKD, v_BSKE, rows, memory=None, scoring=None):
        position = rows.position_BT
        ids = jnp.ones_like(position) if rows.segment_ids_BT is None else rows.segment_ids_BT
        run_BT = jnp.cumsum(position == 0, axis=1)
        seen = (run_BT[:, :, None] == run_BT[:, None]) & (position[:, :, None] >= position[:, None])
        seen &= (ids != 0)[:, None]
        return self._of(q_BTHD, k_BSKD, v_BSKE, seen, position + 1)

    def empty_state(self, sizes, batch, dtype, capacity):
        sums = jnp.zeros((batch, sizes.heads, sizes.head_size, sizes.value_size))
        return MeanState(sums, jnp.zeros(batch, jnp.int32))

    def extend(self, q_BTHD, k_BTKD, v_BTKE, state, count_B, scoring=None):
        T = q_BTHD.shape[1]
        y, pending = self.verify(q_BTHD, k_BTKD, v_BTKE, state, chain(T))
        return y, self.commit(state, pending, jnp.broadcast_to(jnp.arange(T)[None], q_BTHD.shape[:2]), count_B)

    def verify(self, q_BMHD, k_BMKD, v_BMKE, state, tree, scoring=None):
        seen = jnp.broadcast_to(jnp.asarray(tree.ancestor_MM)[None], (q_BMHD.shape[0], tree.nodes, tree.nodes))
        count = state.length_B[:, None] + jnp.asarray(tree.depth_M)[None] + 1
        y = self._of(q_BMHD, k_BMKD, v_BMKE, seen, count, state.sum_BHDE)
        return y, (self._signed(k_BMKD), v_BMKE)

    def commit(self, state, pending, path_BM, count_B):
        k, v = (jnp.take_along_axis(x, path_BM[:, :, None, None], axis=1) for x in pending)
        kept = (jnp.arange(path_BM.shape[1])[None] < count_B[:, None])[:, :, None, None]
        sums = state.sum_BHDE + jnp.einsum("bthd,bthe->bhde", jnp.where(kept, k, 0), v)
        return MeanState(sums, state.length_B + count_B)

    @classmethod
    def flops(cls, config, sizes, tokens, *, tiled=False):
        return 2 * tokens * sizes.heads * (sizes.head_size + sizes.value_size)

    @classmethod
    def official_names(cls, config, family):
        return [OfficialName("weight", "mean_weight")]


# A decoder that holds any attention.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(ModelConfig):
    """A small decoder."""

    architecture: Literal["toy"] = setting("toy", "which model these settings are of")
    heads: int = setting(2, "heads H")
    attention: AttentionConfig = variants(MeanConfig, ATTENTIONS, "the attention of every layer")


class ToyLayer(ResidualLayer):
    def __init__(self, config, *, rngs):
        C = config.width
        self.config = config
        self.norm = RMSNorm(C, 1e-5)
        self.joint = Linear(C, 3 * C, ("width", "heads"), roles=("attention",), rngs=rngs)
        self.mixing = make_attention(config.attention, Toy.head_sizes(config), rngs)
        self.output = Linear(C, C, ("heads", "width"), roles=("attention",), rngs=rngs)

    def project(self, x_BTC, partition, *shared):
        joint = self.joint.parts(self.norm(x_BTC), 3, partition)
        q, k, v = (x.reshape(*x.shape[:2], self.config.heads, -1) for x in joint)
        return q, k, v

    def join(self, y_BTHE):
        return self.output(y_BTHE.reshape(*y_BTHE.shape[:2], -1))

    def feed(self, x_BTC):
        return x_BTC

    @property
    def sizes(self):
        return Toy.head_sizes(self.config)


def toy_table(config):
    layer = "toy.{layer}."
    return [
        Entry("toy.embedding", "embedding"),
        Entry("toy.norm", "norm.weight"),
        transposed("toy.head", "logits.kernel"),
        Entry(layer + "norm", "layers.norm.weight"),
        *(Entry(f"{layer}{name}.bias", f"layers.{name}.bias") for name in ("joint", "output")),
        *(transposed(f"{layer}{name}.weight", f"layers.{name}.kernel") for name in ("joint", "output")),
        *attention_entries(config, "toy", layer, "layers.mixing."),
    ]


def toy_from(fields, shapes):
    sizes = {name: fields.get(name, int) for name in ("vocabulary_size", "width", "depth", "heads")}
    return ToyConfig(**sizes, attention=attention_from(fields, None))


def toy_to(config):
    sizes = {name: getattr(config, name) for name in ("vocabulary_size", "width", "depth", "heads")}
    return {"model_type": "toy", **sizes, **attention_to(config.attention)}


class Toy(Decoder):
    settings = ToyConfig
    cut_sizes: ClassVar[dict[str, Any]] = {"heads": ("heads",)}
    has_softmax_form = True
    conversion = Conversion(
        model_type="toy",
        name_table=toy_table,
        ignored=lambda config: (),
        config_from=toy_from,
        config_to=toy_to,
        extra_tensors=lambda config: {},
        embedding="toy.embedding",
        head="toy.head",
        is_tied=False,
    )

    def __init__(self, config, *, rngs):
        V, C = config.vocabulary_size, config.width
        self.config = config
        start = jax.random.normal(rngs.params(), (V, C))
        self.embedding = parameter(start, ("vocabulary", "width"), decay=True, roles=("embedding",))
        self.layers = stack_layers(lambda rngs: ToyLayer(config, rngs=rngs), config.depth, rngs)
        self.norm = RMSNorm(C, 1e-5)
        self.logits = Linear(C, V, ("width", "vocabulary"), bias=False, roles=("head",), rngs=rngs)

    def begin(self, tokens_BT, segment_ids_BT, partition=WHOLE):
        rows = place(segment_ids_BT, tokens_BT.shape, partition, heads="heads")
        return look_up(self.embedding[...], tokens_BT, partition).astype(self.config.dtype), rows

    def embed(self, tokens_BT, position_BT):
        return self.embedding[...][tokens_BT].astype(self.config.dtype), ()

    def head(self, x_BTC):
        return self.logits(x_BTC).astype(jnp.float32)

    @classmethod
    def head_sizes(cls, config):
        return HeadSizes(config.heads, config.heads, config.width // config.heads, config.width // config.heads)

    @classmethod
    def matrices(cls, config):
        C, L = config.width, config.depth
        return [Matrix(("layers", "joint", "kernel"), C, 3 * C, L), Matrix(("layers", "output", "kernel"), C, C, L)]


@pytest.fixture(scope="module", autouse=True)
def more_registered():
    ATTENTIONS.register("mean", MeanAttention)
    MODELS.register("toy", Toy)
    yield
    del ATTENTIONS._entries["mean"], MODELS._entries["toy"]


TOY = {"vocabulary_size": 300, "width": 16, "depth": 3}


@pytest.fixture(scope="module")
def toy_settings(settings):
    def make(workdir, **fields):
        given = settings(workdir)
        data = dataclasses.replace(given.data, tokenizer="train", tokenizer_vocabulary=300, packing="segments")
        fields = {"mesh": MeshConfig(data=2, fsdp=2, tensor=2), "finetune": FinetuneConfig(), **fields}
        return dataclasses.replace(given, model=ToyConfig(**TOY), data=data, **fields)

    return make


@pytest.fixture(scope="module")
def toy_run(toy_settings, tmp_path_factory):
    config = toy_settings(tmp_path_factory.mktemp("toy") / "run")
    train(config, lambda line: None)
    return config


def everything(directory):
    """All parameters and constants of what `load` reads."""
    model = load(directory)[0]
    return jax.device_get({**parameters_by_path(model), **constants_by_path(model)})


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_model_learns_on_eight_devices_as_on_one_axis(toy_run, toy_settings, tmp_path):
    losses = [line["loss"] for line in metrics(toy_run) if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    other = toy_settings(tmp_path / "run", mesh=MeshConfig(data=8), train=TrainConfig(steps=4, evaluate_batches=1))
    train(other, lambda line: None)
    np.testing.assert_allclose([line["loss"] for line in metrics(other) if "loss" in line][:4], losses[:4], rtol=1e-5)


def test_a_model_goes_on_bit_for_bit(toy_run, toy_settings, tmp_path):
    half = dataclasses.replace(toy_run.train, steps=8)
    constant_rate = dataclasses.replace(toy_run.optimizer, schedule="constant")
    train(toy_settings(tmp_path / "run", train=half, optimizer=constant_rate), lambda line: None)
    train(toy_settings(tmp_path / "run", optimizer=constant_rate), lambda line: None)
    assert_same(everything(tmp_path / "run"), everything(toy_run.workdir))


def test_a_model_is_planned(toy_settings, tmp_path):
    told = plan(toy_settings(tmp_path / "run", plan="cpu:8"), lambda line: None)
    count = 2 * 300 * 16 + 16 + 3 * (16 + 16 * 48 + 48 + 16 * 16 + 16 + 2)
    assert f" {count:,}" in told


def test_a_model_decodes_trees_exactly(toy_run):
    model, tokenizer = load(toy_run.workdir)
    prompt = np.asarray(tokenizer.encode("12 and 13"))[None]
    tree = tree_from_paths([[0], [1], [0, 0], [1, 0], [1, 0, 0]])
    nodes = np.arange(tree.nodes)[None] + 5
    _, state = model.forward(jnp.asarray(prompt), model.empty_state(1, 64))
    found, pending = model.verify(jnp.asarray(nodes), tree, state)
    for node in range(tree.nodes):
        path = nodes[:, tree.path_MQ[node][: tree.depth_M[node] + 1]]
        expected = model.features(jnp.asarray(np.concatenate([prompt, path], axis=1)))[:, -1]
        np.testing.assert_allclose(found[:, node], expected, atol=2e-5)
    path = jnp.asarray(tree.path_MQ[5])[None]
    after = model.commit(state, pending, path, jnp.asarray([3]))
    more, _ = model.forward(jnp.asarray([[9]]), after)
    text = np.concatenate([prompt, nodes[:, tree.path_MQ[5][:3]], [[9]]], axis=1)
    np.testing.assert_allclose(more[:, -1], model.features(jnp.asarray(text))[:, -1], atol=2e-5)
    prompts = ["12 and 13 are", "7 and", "40 and 41 are 81. 40 and"]
    plain, drafted = (
        lin_jax.generate(model, tokenizer, prompts, max_new_tokens=24, draft=draft) for draft in ("none", "lookup")
    )
    assert plain == drafted and any(plain)


def test_a_model_is_converted_there_and_back(toy_run, tmp_path, capsys):
    there, back = str(tmp_path / "hf"), str(tmp_path / "back")
    assert convert_main(["--input", toy_run.workdir, "--output", there, "--to", "hf", "--check"]) == 0
    assert convert_main(["--input", there, "--output", back, "--check"]) == 0
    assert capsys.readouterr().out.count("result against source") == 2
    assert_same(everything(there), everything(toy_run.workdir))
    assert_same(everything(back), everything(toy_run.workdir))
    half, plain = str(tmp_path / "half"), str(tmp_path / "softmax")
    assert convert_main(["--input", back, "--output", half, "--attention", "half_mean"]) == 0
    assert load(half)[0].config.attention == MeanConfig(half=True)
    assert convert_main(["--input", back, "--output", plain, "--attention", "softmax"]) == 0
    again = str(tmp_path / "again")
    assert convert_main(["--input", plain, "--output", again, "--attention", "half_mean"]) == 0
    fresh = everything(again)
    np.testing.assert_array_equal(fresh["layers.mixing.weight"], np.ones((3, 2)))
    assert set(np.unique(fresh["layers.mixing.signs"])) == {-1, 1}


def test_a_model_is_set_by_the_command_line(tmp_path):
    file = tmp_path / "config.py"
    file.write_text("from lin_jax.experiment import Config\n\ndef get_config():\n    return Config()\n")
    given = ["--config.model.heads=4", "--config.model.architecture=toy", "--config.model.attention=half_mean"]
    assert load_config(str(file), given).model == ToyConfig(
        vocabulary_size=50257, width=768, depth=24, heads=4, attention=MeanConfig(half=True)
    )


# A feature map.


def cube(x):
    return x**3


def test_a_feature_map_runs_in_every_form_that_is_no_kernel():
    FEATURE_MAPS["cube"] = FeatureMap("cube", cube, non_negative=False)
    try:
        config = LlamaConfig(
            vocabulary_size=20,
            width=16,
            depth=2,
            heads=2,
            key_value_heads=2,
            head_size=8,
            feed_forward_size=16,
            attention=AugmentedConfig(group_size=4, convolution=3, feature_map="cube", grouped_weight="one"),
        )
        model, tokens = create_model(config, nnx.Rngs(0)), jnp.arange(17)[None]
        slow = dataclasses.replace(config, attention=dataclasses.replace(config.attention, implementation="reference"))
        identity = dataclasses.replace(config, attention=dataclasses.replace(config.attention, feature_map="identity"))
        y, reference, other = (nnx.clone(model), create_model(slow, nnx.Rngs(0)), create_model(identity, nnx.Rngs(0)))
        np.testing.assert_allclose(y(tokens), reference(tokens), atol=1e-5)
        assert np.abs(np.asarray(y(tokens) - other(tokens))).max() > 1e-6
        step, state = [], model.empty_state(1, 32)
        for token in np.asarray(tokens[0]):
            x, state = model.forward(jnp.asarray([[token]]), state)
            step.append(x[:, 0])
        np.testing.assert_allclose(jnp.stack(step, axis=1), model.features(tokens), atol=1e-5)
        for kernel in ("pallas_tpu", "pallas_gpu"):
            attention = dataclasses.replace(config.attention, implementation=kernel)
            named = create_model(dataclasses.replace(config, attention=attention), nnx.Rngs(0))
            with pytest.raises(ValueError, match=f"implementation={kernel} cannot run: .*cube"):
                named(tokens)
    finally:
        del FEATURE_MAPS["cube"]


@pytest.fixture(scope="module")
def teacher(settings, tmp_path_factory):
    """A run of a wider model, with random projections that a run keeps."""
    attention = AugmentedConfig(group_size=8, convolution=4, feature_map="favor", feature_size=16)
    model = FlashConfig(vocabulary_size=257, width=24, depth=1, query_key_size=8, rotary_size=4, attention=attention)
    config = settings(
        tmp_path_factory.mktemp("teacher") / "run",
        model=model,
        finetune=FinetuneConfig(),
        train=TrainConfig(steps=4, evaluate_batches=1),
    )
    train(config, lambda line: None)
    return config.workdir


@pytest.fixture
def distilling(settings, teacher):
    short = TrainConfig(steps=6, evaluate_every=3, evaluate_batches=1)
    checkpoint = CheckpointConfig(every=2)
    config = settings("runs/distilled", finetune=FinetuneConfig(), train=short, checkpoint=checkpoint)

    def make(workdir, teacher=teacher):
        given = {"workdir": workdir, "finetune.objective": "distillation", "finetune.teacher": teacher}
        return apply_overrides(config, [f"--config.{name}={value}" for name, value in given.items()])

    return make


def test_a_teacher_teaches_and_stays_where_it_is(distilling, teacher, tmp_path, monkeypatch):
    whole, config = distilling(tmp_path / "whole"), distilling(tmp_path / "run")
    train(whole, lambda line: None)
    train_killed(config, monkeypatch, 5)
    train(config, lambda line: None)
    assert metrics(config) == metrics(whole)
    jax.tree.map(np.testing.assert_array_equal, parameters(config), parameters(whole))
    assert "teacher" not in parameters(whole) and not hasattr(load_model(whole.workdir)[0], "teacher")
    losses = [line["loss"] for line in metrics(whole) if "loss" in line]
    assert losses[-1] < losses[0]
    # The first loss, by hand: of the student before any step, which the same seed makes again.
    student, (theirs, tokenizer, _) = create_model(whole.model, nnx.Rngs(jax.random.key(0))), load_model(teacher)
    batch = next(training_batches(whole.data, tokenizer))
    wanted, found = (jax.nn.log_softmax(model(jnp.asarray(batch["tokens"]))) for model in (theirs, student))
    nll = -(np.exp(np.asarray(wanted)) * np.asarray(found)).sum(axis=-1)
    np.testing.assert_allclose(losses[0], (nll * batch["weights"]).sum() / batch["weights"].sum(), rtol=1e-4)


def test_another_teacher_is_refused(distilling, teacher, settings, tmp_path, monkeypatch):
    config = distilling(tmp_path / "run")
    train_killed(config, monkeypatch, 4)
    other = settings(
        tmp_path / "other",
        model=load_model(teacher)[2].model,
        finetune=FinetuneConfig(),
        train=TrainConfig(steps=1, evaluate_batches=1, seed=1),
    )
    train(other, lambda line: None)
    with pytest.raises(ConfigError, match=f"the parameters in teacher {other.workdir} are not those"):
        train(distilling(config.workdir, other.workdir), lambda line: None)
    with pytest.raises(ConfigError, match="there is no checkpoint in .*none"):
        train(distilling(config.workdir, tmp_path / "none"), lambda line: None)
