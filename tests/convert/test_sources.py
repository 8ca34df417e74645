"""Sources of other code: files of llama2.c, official FLASH state dicts, LoRA adapters, names on the Hub."""

import dataclasses
import fnmatch
import json
import shutil
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lin_jax.convert import hub
from lin_jax.convert.hugging_face import Placement, read_hugging_face
from lin_jax.convert.source import Input, read_source
from lin_jax.train.saved_model import load_model
from tests.convert.test_convert import GPT2, LLAMA, STORIES, assert_refused, convert, make_directory, needs_stories
from tests.golden import FIXTURES, Golden

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS = np.random.default_rng(1).integers(3, 200, (1, 40))
SMALL = dataclasses.replace(LLAMA, head_size=4, attention_bias=False)
FLASH = Golden(FIXTURES / "flash__aug_conv63_laplace_ar_n100.npz")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("sources") / "base", SMALL)


def logits_of_run(path):
    model, _, _ = load_model(str(path))
    return np.asarray(model(jnp.asarray(TOKENS)))


def assert_only(directory, *names):
    assert sorted(path.name for path in directory.iterdir()) == sorted(names)


# llama2.c


def interleaved(weight, heads):
    """Meta's order of a head's channels, from Hugging Face's: 0, D/2, 1, D/2 + 1, ..."""
    size = len(weight) // heads
    order = np.arange(size).reshape(2, -1).T.ravel()
    return np.concatenate([weight[head * size : (head + 1) * size][order] for head in range(heads)])


def in_order(tensors, config, version):
    """The arrays of a file as llama2.c's readers expect them."""
    layers = range(config.depth)
    each = lambda name: [tensors[f"model.layers.{i}.{name}.weight"] for i in layers]  # noqa: E731
    norms, ffn_norms = each("input_layernorm"), each("post_attention_layernorm")
    q = [interleaved(x, config.heads) for x in each("self_attn.q_proj")]
    k = [interleaved(x, config.key_value_heads) for x in each("self_attn.k_proj")]
    attention = [*q, *k, *each("self_attn.v_proj"), *each("self_attn.o_proj")]
    forward = [*each("mlp.gate_proj"), *each("mlp.down_proj"), *each("mlp.up_proj")]
    embedding, norm = [tensors["model.embed_tokens.weight"]], [tensors["model.norm.weight"]]
    head = [] if config.tie_embeddings else [tensors["lm_head.weight"]]
    if version == 0:
        tables = [np.zeros((config.positions, config.head_size), np.float32)]
        return [*embedding, *norms, *attention, *ffn_norms, *forward, *norm, *tables, *head]
    return [*norms, *ffn_norms, *norm, *embedding, *attention, *forward, *head]


def write_llama2c(file, tensors, config, version, group=32):
    numbers = [config.width, config.feed_forward_size, config.depth, config.heads, config.key_value_heads]
    vocabulary = config.vocabulary_size
    with file.open("wb") as out:
        if version == 0:
            signed = vocabulary if config.tie_embeddings else -vocabulary
            out.write(struct.pack("<7i", *numbers, signed, config.positions))
        else:
            out.write(
                b"24ka" + struct.pack("<8iB", version, *numbers, vocabulary, config.positions, config.tie_embeddings)
            )
            out.write(struct.pack("<i", group) if version == 2 else b"")
            out.write(b"\0" * (256 - out.tell()))
        for array in in_order(tensors, config, version):
            if version < 2 or array.ndim == 1:
                out.write(array.astype("<f4").tobytes())
                continue
            groups = array.reshape(-1, group)
            scale = np.abs(groups).max(axis=1, keepdims=True) / 127
            out.write(np.round(groups / scale).astype(np.int8).tobytes() + scale.astype("<f4").tobytes())
    return file


@needs_stories
@pytest.mark.parametrize("version", [0, 1])
def test_the_trained_checkpoint_as_a_file_of_llama2c(version, tmp_path, capsys):
    source = read_hugging_face(STORIES)
    file = write_llama2c(tmp_path / "stories.bin", load_file(STORIES / "model.safetensors"), source.config, version)
    assert convert(file, tmp_path / "run", "--tokenizer", str(STORIES), "--check") == 0
    assert "result against source: max |logit difference| 0.00e+00" in capsys.readouterr().out
    expected = np.asarray(source.model()(jnp.asarray(TOKENS)))
    assert np.abs(logits_of_run(tmp_path / "run") - expected).max() < 1e-4
    assert convert(tmp_path / "run", tmp_path / "hf", "--to", "hf") == 0
    back, original = load_file(tmp_path / "hf" / "model.safetensors"), load_file(STORIES / "model.safetensors")
    assert back.keys() == original.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("tied", [True, False])
def test_groups_of_int8_of_llama2c(base, tied, tmp_path):
    config = dataclasses.replace(SMALL, tie_embeddings=tied)
    tensors = load_file(base / "model.safetensors")
    file = write_llama2c(tmp_path / "model.bin", tensors, config, 2, group=16)
    assert convert(file, tmp_path / "hf", "--tokenizer", str(base), "--to", "hf") == 0
    back = load_file(tmp_path / "hf" / "model.safetensors")
    assert back.keys() == tensors.keys() - ({"lm_head.weight"} if tied else set())
    for name, array in back.items():
        groups = tensors[name].reshape(-1, 16)
        if array.ndim > 1:
            scale = np.abs(groups).max(axis=1, keepdims=True) / 127
            groups = np.round(groups / scale) * scale.astype(np.float32)
        np.testing.assert_array_equal(array.reshape(-1, 16), groups.astype(np.float32))


def test_wrong_files_of_llama2c(base, tmp_path, capsys):
    tensors = load_file(base / "model.safetensors")
    for version in (0, 1, 2):
        file = write_llama2c(tmp_path / "model.bin", tensors, SMALL, version, group=16)
        whole = file.read_bytes()
        for size, message in ((len(whole) - 4, "is cut short: it has"), (len(whole) + 4, "but its header means")):
            file.write_bytes((whole + b"\0" * 4)[:size])
            assert convert(file, tmp_path / "out", "--tokenizer", str(base)) == 2
            assert_refused(capsys, message)
    file.write_bytes(whole)
    assert convert(file, tmp_path / "out") == 2
    assert_refused(capsys, "has no tokenizer: give --tokenizer DIR")
    file.write_bytes(whole[:100])
    assert convert(file, tmp_path / "out", "--tokenizer", str(base)) == 2
    assert_refused(capsys, "cut short within its header")
    file.write_bytes(whole[:4] + struct.pack("<i", 7) + whole[8:])
    assert convert(file, tmp_path / "out", "--tokenizer", str(base)) == 2
    assert_refused(capsys, "is no file of llama2.c in its first form, version 1 or version 2")
    assert_only(tmp_path, "model.bin")


# The official FLASH

FLASH_SETTINGS = ("--config.model.attention.group_size=32", "--config.model.attention.local=laplace")


def write_flash(path, prefix=""):
    path.parent.mkdir(exist_ok=True)
    save_file({prefix + name: array for name, array in FLASH.arrays("param").items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.net."])
def test_official_flash(prefix, tmp_path):
    file = write_flash(tmp_path / "dir" / "model.safetensors", prefix)
    for number, source in enumerate((file, file.parent)):
        given = Input(str(source), str(small_tokenizer(tmp_path)), None, FLASH_SETTINGS)
        weights = read_source(given, Placement()).weights
        logits = np.asarray(weights.model()(jnp.asarray(FLASH.arrays("in")["ids"][:, :-1])))
        assert np.abs(logits - FLASH.arrays("out")["logits"]).max() < 1e-4, number
    assert convert(file, tmp_path / "run", "--tokenizer", str(small_tokenizer(tmp_path)), *FLASH_SETTINGS) == 0
    model, _, config = load_model(str(tmp_path / "run"))
    assert config.model == weights.config and config.model.attention.convolution == 32
    np.testing.assert_array_equal(np.asarray(model(jnp.asarray(FLASH.arrays("in")["ids"][:, :-1]))), logits)


def test_official_flash_of_pytorch(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    file = tmp_path / "flash.pt"
    torch.save({name: torch.from_numpy(array) for name, array in FLASH.arrays("param").items()}, file)
    assert convert(file, tmp_path / "run", "--tokenizer", str(small_tokenizer(tmp_path)), *FLASH_SETTINGS) == 0
    assert "not used: abs_pos_emb.inv_freq, layers.*.rotary_pos_emb.freqs" in capsys.readouterr().out


def small_tokenizer(path):
    """A tokenizer of the 95 characters of ASCII."""
    import tokenizers

    directory = path / "tokenizer"
    if not directory.exists():
        directory.mkdir()
        vocabulary = {chr(code): code - 32 for code in range(32, 127)} | {"</s>": 95}
        tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [])).save(str(directory / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_wrong_flash(tmp_path, capsys):
    file = write_flash(tmp_path / "flash.safetensors")
    tokenizer = ("--tokenizer", str(small_tokenizer(tmp_path)))
    assert convert(file, tmp_path / "out", *tokenizer, "--config.model.norm=layernorm") == 2
    assert_refused(capsys, "the checkpoint lacks layers.0.norm.bias")
    assert convert(file, tmp_path / "out", "--tokenizer", "bytes") == 2
    assert_refused(capsys, "its tokenizer has 257 tokens, but its model knows 97")
    save_file({"weight": np.zeros(3)}, file)
    assert convert(file, tmp_path / "out", *tokenizer) == 2
    assert_refused(capsys, "has no config.json, and its tensors are neither of an official FLASHTransformer")
    assert_only(tmp_path, "flash.safetensors", "tokenizer")


# LoRA

RANK, ALPHA = 4, 16
CHANGED = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (8, 16), "mlp.down_proj": (16, 24)}


def write_adapter(path, settings=None, change=lambda tensors: None):
    """Factors for three matrices of every layer, and a whole norm, with PEFT's names."""
    random = np.random.default_rng(2)
    tensors = {}
    for layer in range(SMALL.depth):
        for module, (outputs, inputs) in CHANGED.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = random.normal(size=(RANK, inputs)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = random.normal(size=(outputs, RANK)).astype(np.float32)
    tensors["base_model.model.model.norm.weight"] = random.normal(size=16).astype(np.float32)
    change(tensors)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "modules_to_save": ["norm"], **(settings or {})}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return tensors


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 4.0), ({"use_rslora": True}, 8.0), ({"alpha_pattern": {"q_proj": 2, "down_proj": 2, "v_proj": 2}}, 0.5)],
)
def test_an_adapter_is_merged(base, settings, scale, tmp_path):
    tensors = write_adapter(tmp_path / "adapter", settings)
    arguments = ("--adapter", str(tmp_path / "adapter"), "--to", "hf")
    assert convert(base, tmp_path / "out", *arguments) == 0
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        module = "base_model.model." + name.removesuffix(".weight")
        expected = array
        if f"{module}.lora_A.weight" in tensors:
            a, b = (tensors[f"{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
            expected = array + scale * b @ a
            assert np.abs(expected - array).max() > 0.5
        elif name == "model.norm.weight":
            expected = tensors[module + ".weight"]
        assert np.abs(after[name] - expected).max() < 1e-5, name


def test_an_adapter_computes_what_its_formula_says(base, tmp_path):
    """W x + scale B (A x), applied beside Hugging Face's own layers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tensors = write_adapter(tmp_path / "adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def beside(a, b):
        return lambda module, inputs, output: output + ALPHA / RANK * (inputs[0] @ a.T) @ b.T

    for name, module in model.named_modules():
        if f"base_model.model.{name}.lora_A.weight" in tensors:
            factors = (torch.from_numpy(tensors[f"base_model.model.{name}.lora_{part}.weight"]) for part in "AB")
            module.register_forward_hook(beside(*factors))
    model.model.norm.weight.data = torch.from_numpy(tensors["base_model.model.model.norm.weight"])
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS)).logits.numpy()
    assert convert(base, tmp_path / "run", "--adapter", str(tmp_path / "adapter")) == 0
    actual = logits_of_run(tmp_path / "run")
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


def test_an_adapter_of_embeddings_and_of_conv1d(tmp_path):
    base = make_directory(tmp_path / "gpt2", GPT2)
    random = np.random.default_rng(3)
    shapes = {"transformer.h.0.attn.c_proj": ("", 16, 16), "transformer.wte": ("embedding_", 300, 16)}
    tensors = {}
    for module, (kind, inputs, outputs) in shapes.items():
        end = "" if kind else ".weight"
        tensors[f"base_model.model.{module}.lora_{kind}A{end}"] = random.normal(size=(RANK, inputs)).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_{kind}B{end}"] = random.normal(size=(outputs, RANK)).astype(np.float32)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "fan_in_fan_out": True}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert convert(base, tmp_path / "out", "--adapter", str(adapter), "--to", "hf") == 0
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    a, b = list(tensors.values())[:2]
    name = "transformer.h.0.attn.c_proj.weight"  # [inputs, outputs]
    np.testing.assert_allclose(after[name] - before[name], (b @ a).T, atol=1e-5)
    a, b = list(tensors.values())[2:]
    np.testing.assert_allclose(after["transformer.wte.weight"] - before["transformer.wte.weight"], (b @ a).T, atol=1e-5)


def test_the_whole_parameters_of_a_longlora(base, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    write_adapter(
        tmp_path / "adapter", {"modules_to_save": None}, lambda t: t.pop("base_model.model.model.norm.weight")
    )
    random = np.random.default_rng(4)
    whole = {"model.embed_tokens.weight": random.normal(size=(300, 16)), "model.norm.weight": random.normal(size=16)}
    for layer in range(SMALL.depth):
        attention = f"model.layers.{layer}.self_attn."
        filters = random.normal(size=(4, 1, 63, 1))
        filters[:, :, 32:] = 0
        whole |= {attention + "dwconv.weight": filters, attention + "global_factor": random.normal(size=1)}
    whole = {name: array.astype(np.float32) for name, array in whole.items()}
    named = {f"base_model.model.{name}": torch.from_numpy(array) for name, array in whole.items()}
    torch.save(named, tmp_path / "adapter" / "trainable_params.bin")
    assert convert(base, tmp_path / "out", "--adapter", str(tmp_path / "adapter"), "--to", "hf") == 0
    assert "augmented attention" in capsys.readouterr().out
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, array in whole.items():
        np.testing.assert_array_equal(after[name], array)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BAD_ADAPTERS = {
    "lacks lora_B of model.layers.0.self_attn.q_proj": lambda t: t.pop(f"{Q}.lora_B.weight"),
    "is an adapter of another model: its model.layers.0.self_attn.q_proj.weight has shape (16, 12)": lambda t: t.update(
        {f"{Q}.lora_A.weight": np.zeros((RANK, 12), np.float32)}
    ),
    "are no factors of a matrix": lambda t: t.update({f"{Q}.lora_A.weight": np.zeros((3, 16), np.float32)}),
    "is an adapter of another model: this one has no model.layers.3.self_attn.q_proj.weight": lambda t: t.update(
        {name.replace("layers.0", "layers.3"): t[name] for name in (f"{Q}.lora_A.weight", f"{Q}.lora_B.weight")}
    ),
    "lacks norm, which its modules_to_save names": lambda t: t.pop("base_model.model.model.norm.weight"),
    "the model has no place for model.extra.weight": lambda t: t.update(
        {"base_model.model.model.extra.weight": np.zeros(3, np.float32)}
    ),
    "holds model.layers.0.self_attn.q_proj.weight both whole and as an update": lambda t: t.update(
        {f"{Q}.weight": np.zeros((16, 16), np.float32)}
    ),
}


@pytest.mark.parametrize("message", BAD_ADAPTERS)
def test_wrong_adapters(base, message, tmp_path, capsys):
    write_adapter(tmp_path / "adapter", None, BAD_ADAPTERS[message])
    assert convert(base, tmp_path / "out", "--adapter", str(tmp_path / "adapter")) == 2
    assert_refused(capsys, message)
    assert_only(tmp_path, "adapter")


def test_directories_that_are_no_adapters(base, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    write_adapter(adapter, {"use_dora": True})
    arguments = (base, tmp_path / "out", "--adapter", str(adapter))
    assert convert(*arguments) == 2
    assert_refused(capsys, "use_dora=true is not supported")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    assert convert(*arguments) == 2
    assert_refused(capsys, "peft_type=LOHA is not supported, only LORA")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 1}')
    (adapter / "adapter_model.safetensors").unlink()
    assert convert(*arguments) == 2
    assert_refused(capsys, "lacks its tensors: neither adapter_model.safetensors nor adapter_model.bin")
    (adapter / "adapter_config.json").unlink()
    assert convert(*arguments) == 2
    assert_refused(capsys, "is no adapter: it has no adapter_config.json")
    assert_only(tmp_path, "adapter")


# The Hub


def fake_hub(repository, cache, asked):
    """`snapshot_download` of one repository that lies in a directory."""

    def download(name, *, allow_patterns, etag_timeout):
        asked.append(name)
        cache.mkdir(exist_ok=True)
        for path in repository.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)

    return download


def test_a_model_of_the_hub(base, tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    shutil.copytree(base, repository)
    (repository / "pytorch_model.bin").write_bytes(b"the same once more")
    (repository / "consolidated.safetensors").write_bytes(b"and again")
    asked = []
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", fake_hub(repository, tmp_path / "cache", asked))
    assert convert("some-people/some-model", tmp_path / "out", "--to", "hf") == 0
    assert asked == ["some-people/some-model"]
    assert_only(tmp_path / "cache", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_model_of_the_hub_without_safetensors(base, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    repository = tmp_path / "repository"
    shutil.copytree(base, repository)
    tensors = load_file(repository / "model.safetensors")
    (repository / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, repository / "pytorch_model.bin")
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", fake_hub(repository, tmp_path / "cache", []))
    assert convert("some-model", tmp_path / "out") == 0


def test_a_hub_that_is_not_there(tmp_path, capsys, monkeypatch):
    def download(name, **_):
        raise ConnectionError("Name or service not known\nand a long story")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    assert convert("some-people/some-model", tmp_path / "out") == 2
    assert_refused(
        capsys, "some-people/some-model is no directory here and cannot be had from the Hugging Face Hub (Name"
    )
    for name in ("/nowhere/at/all", "./model", "a/b/c"):
        assert convert(name, tmp_path / "out") == 2
        assert_refused(capsys, "is neither a file, nor a directory, nor the name of a model")
    assert_only(tmp_path)
