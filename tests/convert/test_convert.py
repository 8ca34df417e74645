"""convert_weights.py: nothing is lost there and back, on a trained checkpoint too; wrong input takes one line."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import convert_weights
import eval as eval_program
import train as train_program
from lin_jax.convert import checkpoint_files, directory, gpt2, llama
from lin_jax.convert.hugging_face import (
    ModelWeights,
    Placement,
    nested,
    read_hugging_face,
    shapes_of,
    write_hugging_face,
)
from lin_jax.data.tokenizers import BytesTokenizer
from lin_jax.experiment import (
    AugmentedConfig,
    Config,
    FlashConfig,
    Gpt2Config,
    LlamaConfig,
    MeshConfig,
    RopeConfig,
    SoftmaxConfig,
)
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.settings.foreign import Fields
from lin_jax.train.saved_model import load_model, save_model
from lin_jax.train.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
STORIES = DATA / "stories260k_hf"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no trained checkpoint at {STORIES}")
AUGMENTED = AugmentedConfig(group_size=8, convolution=3, softmax_layers=(1,))
SOFTMAX = SoftmaxConfig()
LLAMA = LlamaConfig(
    vocabulary_size=300,
    width=16,
    depth=3,
    heads=4,
    key_value_heads=2,
    head_size=6,
    feed_forward_size=24,
    positions=64,
    rope=RopeConfig(scaling="llama3", factor=4.0, original_positions=32),
    attention_bias=True,
    attention=SOFTMAX,
)
GPT2 = Gpt2Config(
    vocabulary_size=300, width=16, depth=3, heads=4, feed_forward_size=24, positions=64, attention=SOFTMAX
)
MODELS = {"llama": LLAMA, "llama_tied": dataclasses.replace(LLAMA, tie_embeddings=True, dtype="bfloat16"), "gpt2": GPT2}


def random_weights(config):
    random = np.random.default_rng(0)
    arrays = {
        path: jnp.asarray(random.normal(size=s.shape), config.dtype).astype(s.dtype)
        for path, s in shapes_of(config).items()
    }
    return ModelWeights(config, arrays)


def make_directory(path, config):
    """A Hugging Face directory with random tensors and a tokenizer of bytes and one token more."""
    path.mkdir()
    write_hugging_face(path, random_weights(config), config.dtype, {})
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "</s>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def convert(source, target, *arguments):
    return convert_weights.main(["--input", str(source), "--output", str(target), *arguments])


def assert_same_tensors(one, other):
    one, other = (load_file(path / "model.safetensors") for path in (one, other))
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tmp_path, capsys):
    source = make_directory(tmp_path / "source", MODELS[name])
    assert convert(source, tmp_path / "ours", "--check") == 0
    printed = capsys.readouterr().out
    assert "result against source: max |logit difference| 0.00e+00" in printed
    model, tokenizer, config = load_model(str(tmp_path / "ours"))
    assert config.model == MODELS[name] and config.workdir == str(tmp_path / "ours")
    assert tokenizer.decode(tokenizer.encode("a story é")) == "a story é" and tokenizer.end_id == 256
    assert convert(tmp_path / "ours", tmp_path / "back", "--to", "hf") == 0
    assert_same_tensors(source, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert read_hugging_face(tmp_path / "back").config == MODELS[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours", "source"]


def types_of(directory):
    model, _, _ = load_model(str(directory))
    return {str(array.dtype) for array in parameters_by_path(model).values()}


def test_parameters_keep_their_type(tmp_path):
    source = make_directory(tmp_path / "source", MODELS["llama_tied"])  # bfloat16
    assert convert(source, tmp_path / "same") == 0 and types_of(tmp_path / "same") == {"bfloat16"}
    assert convert(source, tmp_path / "wide", "--dtype", "float32") == 0 and types_of(tmp_path / "wide") == {"float32"}
    assert load_model(str(tmp_path / "wide"))[2].model.dtype == "bfloat16"  # of activations, which nothing changed
    assert convert(tmp_path / "wide", tmp_path / "narrow", "--dtype", "bfloat16") == 0
    assert types_of(tmp_path / "narrow") == {"bfloat16"}
    assert convert(tmp_path / "wide", tmp_path / "back", "--to", "hf", "--dtype", "bfloat16") == 0
    assert_same_tensors(source, tmp_path / "back")
    augmented = ("--attention", "augmented", "--config.model.dtype=float32")
    assert convert(source, tmp_path / "augmented", *augmented) == 0
    assert types_of(tmp_path / "augmented") == {"bfloat16", "float32"}  # what is new is float32
    assert load_model(str(tmp_path / "augmented"))[2].model.dtype == "float32"


def test_narrow_types_lose_and_the_check_tells(tmp_path, capsys):
    source = make_directory(tmp_path / "source", LLAMA)
    arguments = (source, tmp_path / "narrow", "--dtype", "bfloat16", "--check")
    assert convert(*arguments) == 2  # Attention with such large random scores is decided by rounding.
    assert_refused(capsys, "error: result against source: max |logit difference| ")
    edit_tensors(source, lambda tensors: tensors.update({name: 0.3 * array for name, array in tensors.items()}))
    assert convert(*arguments) == 0
    printed = capsys.readouterr().out
    assert float(printed.split("result against source: max |logit difference| ")[1].split(",")[0]) > 1e-3


def test_float16(tmp_path):
    source = make_directory(tmp_path / "source", LLAMA)
    assert convert(source, tmp_path / "half", "--to", "hf", "--dtype", "float16") == 0
    assert convert(tmp_path / "half", tmp_path / "again", "--to", "hf") == 0
    assert_same_tensors(tmp_path / "half", tmp_path / "again")
    assert convert(tmp_path / "half", tmp_path / "run") == 0 and types_of(tmp_path / "run") == {"float32"}
    assert convert(tmp_path / "run", tmp_path / "back", "--to", "hf", "--dtype", "float16") == 0
    assert_same_tensors(tmp_path / "half", tmp_path / "back")


def test_no_parameters_but_floats(tmp_path, capsys):
    source = make_directory(tmp_path / "source", LLAMA)
    edit_tensors(source, lambda tensors: tensors.update({NORM: np.ones(16, np.int8)}))
    assert convert(source, tmp_path / "out") == 2
    assert_refused(capsys, f"{NORM} is of type I8, but parameters are float64, float32, float16, bfloat16")


def test_each_device_gets_its_part(source):
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    whole, cut = read_hugging_face(source).arrays, read_hugging_face(source, placement=Placement(mesh)).arrays
    for path, array in whole.items():
        np.testing.assert_array_equal(cut[path], array)
    for path in ("embedding", "layers.attention.query.kernel", "layers.feed_forward.down.kernel"):
        assert {shard.data.size * 8 for shard in cut[path].addressable_shards} == {cut[path].size}, path


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_linearized_there_and_back(name, tmp_path, capsys):
    source = make_directory(tmp_path / "source", MODELS[name])
    changes = ["--config.model.attention.group_size=8", "--config.model.attention.softmax_layers=1"]
    changes.append("--config.model.attention.convolution=3")
    assert convert(source, tmp_path / "ours", "--attention", "augmented", *changes) == 0
    printed = capsys.readouterr().out
    assert "mixing.alpha" in printed and "mixing.filter" in printed
    assert load_model(str(tmp_path / "ours"))[2].model.attention == AUGMENTED
    trained = tmp_path / "trained"
    trained.mkdir()
    weights = random_weights(dataclasses.replace(MODELS[name], attention=AUGMENTED))
    write_hugging_face(trained, weights, "float32", {})
    back = read_hugging_face(trained)
    assert back.config == weights.config
    for path, array in weights.arrays.items():
        np.testing.assert_array_equal(back.arrays[path], array)
    # The softmax model is still in it.
    shutil.copytree(source, trained, dirs_exist_ok=True, ignore=lambda *_: ["model.safetensors", "config.json"])
    assert convert(trained, tmp_path / "plain", "--attention", "softmax") == 0
    assert "not used: " in capsys.readouterr().out


def test_official_names_of_a_linearized_llama(tmp_path):
    config = dataclasses.replace(LLAMA, attention=AugmentedConfig(group_size=64))
    write_hugging_face(tmp_path, random_weights(config), "float32", {})
    tensors = load_file(tmp_path / "model.safetensors")
    attention = "model.layers.2.self_attn."
    assert tensors[attention + "dwconv.weight"].shape == (4, 1, 63, 1)
    assert tensors[attention + "global_factor"].shape == (1,) and tensors[attention + "conv_mask"].sum() == 32
    assert not (tensors[attention + "dwconv.weight"] * (1 - tensors[attention + "conv_mask"])).any()
    # Official files have no entry of ours in config.json.
    values = json.loads((tmp_path / "config.json").read_text())
    del values["lin_jax"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_hugging_face(tmp_path).config == config


def test_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "SHARD_BYTES", 20_000)
    source = make_directory(tmp_path / "source", LLAMA)
    shards = list(source.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 25_000 for shard in shards)
    assert not list(source.glob("part-*")) and not (source / "model.safetensors").exists()
    for path, array in random_weights(LLAMA).arrays.items():
        np.testing.assert_array_equal(read_hugging_face(source).arrays[path], array)


def test_first_published_names_of_gpt2(tmp_path):
    """The files on the hub lack the prefix and hold masks."""
    source = make_directory(tmp_path / "source", GPT2)
    tensors = load_file(source / "model.safetensors")
    plain = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    plain["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    save_file(plain, source / "model.safetensors")
    for path, array in random_weights(GPT2).arrays.items():
        np.testing.assert_array_equal(read_hugging_face(source).arrays[path], array)


def test_old_and_new_forms_of_rope_settings():
    base = llama.config_to_hugging_face(LLAMA)
    old = {**base, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0}
    new = {**base, "rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}
    del new["rope_theta"]
    for values in (old, new):
        rope = llama.config_from_hugging_face(Fields(values, "config.json"), {}).rope
        assert rope == RopeConfig(theta=500.0, scaling="linear", factor=2.0)
    assert llama.config_from_hugging_face(Fields(base, "config.json"), {}) == LLAMA
    assert gpt2.config_from_hugging_face(Fields(gpt2.config_to_hugging_face(GPT2), "config.json"), {}) == GPT2


def edit_config(source, **changes):
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, **changes}))


def edit_tensors(source, change):
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def index(source, file):
    names = load_file(source / "model.safetensors")
    where = json.dumps({"weight_map": dict.fromkeys(names, file)})
    (source / "model.safetensors.index.json").write_text(where)
    (source / "model.safetensors").unlink()


def cut_short(source):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


NORM = "model.layers.1.input_layernorm.weight"
BAD_SOURCES = {
    "lacks model-00002.safetensors": lambda s: index(s, "model-00002.safetensors"),
    f"{NORM} has shape (5,), which does not fit": lambda s: edit_tensors(s, lambda t: t.update({NORM: np.ones(5)})),
    f"the checkpoint lacks {NORM}": lambda s: edit_tensors(s, lambda t: t.pop(NORM)),
    "the model has no place for extra": lambda s: edit_tensors(s, lambda t: t.update(extra=np.ones(1))),
    "config.json: unknown architecture 'mamba'; there are llama, gpt2": lambda s: edit_config(s, model_type="mamba"),
    "which does not fit embedding(300, 32)": lambda s: edit_config(s, hidden_size=32),
    "heads=4 is not divisible": lambda s: edit_config(s, num_key_value_heads=3),
    "config.json: intermediate_size is missing": lambda s: edit_config(s, intermediate_size=None),
    "hidden_act=gelu is not supported": lambda s: edit_config(s, hidden_act="gelu"),
    "rope scaling 'yarn' is not supported": lambda s: edit_config(s, rope_scaling={"rope_type": "yarn"}),
    "config.json is not JSON": lambda s: (s / "config.json").write_text("{"),
    "has no config.json": lambda s: (s / "config.json").unlink(),
    "holds no tensors": lambda s: (s / "model.safetensors").unlink(),
    "or is cut short": cut_short,
    "no tokenizer can be read": lambda s: (s / "tokenizer.json").unlink(),
    "config.json: lin_jax.attention.group": lambda s: edit_config(s, lin_jax={"attention": {"group": 3}}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("convert") / "source", LLAMA)


def assert_refused(capsys, message):
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1, printed.err
    assert not printed.out


@pytest.mark.parametrize("message", BAD_SOURCES)
def test_wrong_sources(source, tmp_path, capsys, message):
    bad = tmp_path / "bad"
    shutil.copytree(source, bad)
    BAD_SOURCES[message](bad)
    assert convert(bad, tmp_path / "out") == 2
    assert_refused(capsys, message)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.steps=3"], "only --config.model fields"),
        (["--config.model.widht=3"], "did you mean width"),
        (["--config.model.width=32"], "but the settings of the result need"),
        (["--config.model.tie_embeddings=true"], "the result has no place for logits.kernel"),
        (["--attention", "quadratic"], "kind=quadratic is FLASH's"),
        (["--dtype", "float16"], "--dtype float16 is for --to hf"),
    ],
)
def test_wrong_settings(source, tmp_path, capsys, arguments, message):
    assert convert(source, tmp_path / "out", *arguments) == 2
    assert_refused(capsys, message)
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_of_too_many_tokens(tmp_path, capsys):
    source = make_directory(tmp_path / "source", dataclasses.replace(LLAMA, vocabulary_size=200))
    assert convert(source, tmp_path / "out") == 2
    assert_refused(capsys, "its tokenizer has 257 tokens, but its model knows 200")


def test_a_full_disk(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert convert(source, tmp_path / "out") == 2
    assert_refused(capsys, "has 0 bytes left, but the tensors need")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "function"), [("lin_jax", "save_model"), ("hf", "write_hugging_face")])
@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_fills_up_meanwhile(to, function, there, source, tmp_path, capsys, monkeypatch):
    if there:
        assert convert(source, tmp_path / "out", "--to", to) == 0
        capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write = getattr(directory, function)

    def full(*arguments):
        write(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directory, function, full)
    assert convert(source, tmp_path / "out", "--to", to, "--overwrite") == 2
    assert_refused(capsys, "No space left on device")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if there else [])


def test_what_is_there_stays(source, tmp_path, capsys):
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("ten years of work")
    for arguments, message in (([], "is not empty"), (["--overwrite"], "holds no model, so --overwrite")):
        assert convert(source, target, *arguments) == 2
        assert_refused(capsys, message)
    assert convert(source, source) == 2
    assert_refused(capsys, "is or holds --input")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]
    (target / "thesis.txt").unlink()
    assert convert(source, target, "--to", "hf") == 0 and convert(source, target, "--overwrite", "--to", "hf") == 0
    assert_same_tensors(source, target)


CONFIG = """
from lin_jax.experiment import *

def get_config(workdir):
    attention = AugmentedConfig(group_size=8, convolution=4)
    return Config(
        workdir=workdir,
        model=LlamaConfig(
            vocabulary_size=300, width=16, depth=1, heads=2, key_value_heads=1, head_size=8, feed_forward_size=32,
            attention=attention,
        ),
        data=DataConfig(
            source="text", path=(CORPUS,), sequence_length=16, batch_size=8, tokenizer="train",
            tokenizer_vocabulary=300,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, schedule="constant"),
        train=TrainConfig(steps=10, evaluate_every=0, evaluate_batches=1, log_every=5),
    )
"""


def test_a_trained_model_goes_to_hugging_face(tmp_path, capsys):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": "abc " * (i % 9 + 1) + str(i) * 3}) + "\n" for i in range(150)))
    (tmp_path / "config.py").write_text(CONFIG.replace("CORPUS", repr(str(corpus))))
    run = tmp_path / "run"
    assert train_program.main(["--config", f"{tmp_path}/config.py:{run}"]) == 0
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0] < 6
    assert convert(run, tmp_path / "hf", "--to", "hf") == 0
    back = read_hugging_face(tmp_path / "hf")
    model, tokenizer, config = load_model(str(run))
    assert back.config == config.model and np.asarray(back.arrays["layers.attention.mixing.filter"]).any()
    for path, array in parameters_by_path(model).items():
        np.testing.assert_array_equal(back.arrays[path], array)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode("abc 7") == tokenizer.encode("abc 7").tolist() and theirs.eos_token_id == tokenizer.end_id


def test_hugging_face_has_no_flash(tmp_path, capsys):
    config = FlashConfig(vocabulary_size=257, width=4, depth=1, query_key_size=4, rotary_size=2)
    arrays = {path: jnp.zeros(s.shape, s.dtype) for path, s in shapes_of(config).items()}
    save_model(str(tmp_path / "flash"), nested(arrays), Config(model=config), BytesTokenizer())
    assert convert(tmp_path / "flash", tmp_path / "out", "--to", "hf") == 2
    assert_refused(capsys, "only llama, gpt2, bert, t5 models have Hugging Face's form, but this is a flash model")


class Trap:
    """Leaves a file behind when a pickle of it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_of_pytorch(source, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    bad = tmp_path / "bad"
    shutil.copytree(source, bad)
    tensors = load_file(bad / "model.safetensors")
    (bad / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, bad / "pytorch_model.bin")
    assert convert(bad, tmp_path / "out", "--to", "hf") == 0
    assert_same_tensors(source, tmp_path / "out")
    capsys.readouterr()
    torch.save({NORM: Trap(tmp_path / "executed")}, bad / "pytorch_model.bin")
    assert convert(bad, tmp_path / "worse") == 2
    assert_refused(capsys, "is not a file of tensors alone")
    (bad / "pytorch_model.bin").rename(tmp_path / "single.pt")
    assert convert(tmp_path / "single.pt", tmp_path / "worse") == 2
    assert_refused(capsys, "is not a file of tensors alone")
    (tmp_path / "single.pt").write_bytes(pickle.dumps({NORM: Trap(tmp_path / "executed")}))
    assert convert(tmp_path / "single.pt", tmp_path / "worse") == 2
    assert_refused(capsys, "is not a file of tensors alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "out", "single.pt"]


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    target = tmp_path_factory.mktemp("stories") / "model"
    assert convert(STORIES, target, "--attention", "softmax", "--check") == 0
    return target


def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


@needs_stories
def test_the_trained_checkpoint(stories):
    """Mean negative log-likelihood of 60 stories, each begun with BOS and cut at 512 tokens."""
    model, tokenizer, _ = load_model(str(stories), one_device())
    text = (DATA / "tinystories" / "tinystories_sample.txt").read_text()
    ids = np.zeros((60, 512), np.int32)
    real = np.zeros((60, 512), np.int32)
    for row, story in enumerate(text.split("<|endoftext|>")[:60]):
        tokens = [tokenizer.begin_id, *tokenizer.encode(story.strip())][:512]
        ids[row, : len(tokens)], real[row, : len(tokens)] = tokens, 1
    graph, state = nnx.split(model)

    @jax.jit
    def losses(state, ids):
        log_p = jax.nn.log_softmax(nnx.merge(graph, state)(ids)[:, :-1])
        return -jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1)[..., 0]

    nll = np.concatenate([losses(state, jnp.asarray(part)) for part in np.split(ids, 6)])
    assert real[:, 1:].sum() == 20_424
    assert abs((nll * real[:, 1:]).sum() / real[:, 1:].sum() - 1.2958) < 5e-4


@needs_stories
def test_the_trained_checkpoint_goes_back(stories, tmp_path):
    assert convert(stories, tmp_path / "back", "--to", "hf") == 0
    assert_same_tensors(STORIES, tmp_path / "back")


@needs_stories
def test_the_trained_checkpoint_tells_its_story(stories):
    """The greedy text of its SAMPLE.md."""
    model, tokenizer, _ = load_model(str(stories), one_device())
    graph, state = nnx.split(model)
    length = 120

    @jax.jit
    def write(state):
        model = nnx.merge(graph, state)

        def step(i, ids):
            return ids.at[0, i + 1].set(jnp.argmax(model.head(model.features(ids)[0, i])).astype(jnp.int32))

        return jax.lax.fori_loop(0, length - 1, step, jnp.zeros((1, length), jnp.int32).at[0, 0].set(1))

    text = tokenizer.decode(np.asarray(write(state))[0, 1:]).strip()
    sample = (STORIES / "SAMPLE.md").read_text()
    assert len(text) > 150 and text in sample


@needs_stories
def test_a_converted_model_is_evaluated(stories, tmp_path):
    output = tmp_path / "result.json"
    arguments = ["--checkpoint", str(stories), "--path", str(STORIES / "SAMPLE.md"), "--output", str(output)]
    assert eval_program.main([*arguments, "--window", "128"]) == 0
    assert json.loads(output.read_text())["documents"] == 1
