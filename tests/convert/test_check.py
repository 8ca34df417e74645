"""What --check compares, how much of it, and when it fails."""

import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lin_jax.convert import program
from lin_jax.convert.check import LEAST_TOKENS, TEXT, Difference, check_tokens, compare, logits_of
from lin_jax.data.tokenizers import BytesTokenizer
from lin_jax.layers.linear import Linear
from lin_jax.ops import product
from lin_jax.ops.target import TargetDevice
from lin_jax.settings.base import ConfigError
from tests.convert.test_convert import (
    LLAMA,
    MODELS,
    assert_refused,
    convert,
    edit_tensors,
    make_directory,
    random_weights,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Short(BytesTokenizer):
    """Knows few of the words."""

    def __init__(self, count):
        self.count = count

    def encode(self, text):
        return super().encode(text)[: self.count]


@given(count=st.integers(0, 600), vocabulary=st.integers(1, 300), longest=st.integers(1, 1 << 30))
def test_enough_tokens_are_compared(count, vocabulary, longest):
    tokens_BT = check_tokens(Short(count), vocabulary, longest)
    assert tokens_BT.size >= LEAST_TOKENS and tokens_BT.shape[1] <= longest and tokens_BT.dtype == np.int32
    text = [256, *TEXT.encode()[:count]][:512]
    flat = tokens_BT.ravel().tolist()
    assert flat[: len(text)] == text and all(0 <= token < vocabulary for token in flat[len(text) :])
    assert tokens_BT.size < max(len(text), LEAST_TOKENS) + tokens_BT.shape[1]


def test_a_difference_is_measured():
    source = np.array([[[0.0, 0.0], [3.0, 1.0]]], np.float32)
    result = np.array([[[0.0, 0.0], [3.0, 1.5]]], np.float32)
    found = compare(source, result)
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1.5))
    kl = (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 2
    assert (found.largest, found.scale, found.tokens) == (0.5, 3.0, 2) and abs(found.kl - kl) < 1e-6


@pytest.mark.parametrize(
    ("largest", "scale", "narrow", "fails"),
    [
        (9e-4, 20.0, False, False),
        (1.1e-3, 20.0, False, True),
        (math.nan, 20.0, False, True),
        (math.inf, 20.0, True, True),
        (0.019, 0.5, True, False),
        (0.021, 0.5, True, True),
        (0.39, 20.0, True, False),
        (0.41, 20.0, True, True),
        (math.nan, math.nan, True, True),
    ],
)
def test_what_is_too_much(largest, scale, narrow, fails):
    difference = Difference(largest, scale, 0.0, 100)
    if not fails:
        difference.require_small("one against other", narrow)
        return
    with pytest.raises(ConfigError, match=r"^one against other: max .* over 100 tokens, more than"):
        difference.require_small("one against other", narrow)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("check") / "source", MODELS["llama"])


@pytest.mark.parametrize("there", [False, True])
def test_a_check_that_fails_leaves_what_there_was(source, there, tmp_path, capsys, monkeypatch):
    """A fault in writing: one number of the result is another."""
    if there:
        assert convert(source, tmp_path / "out", "--to", "hf") == 0
        capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write = program.write_transformers

    def damage(directory, *arguments):
        write(directory, *arguments)
        edit_tensors(directory, lambda tensors: tensors["model.norm.weight"].__setitem__(0, 9))

    monkeypatch.setattr(program, "write_transformers", damage)
    assert convert(source, tmp_path / "out", "--to", "hf", "--check", "--overwrite") == 2
    assert_refused(capsys, "error: result against source: max |logit difference| ")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if there else [])


def test_another_attention_may_differ(source, tmp_path, capsys):
    arguments = ("--attention", "augmented", "--config.model.attention.group_size=8", "--check")
    assert convert(source, tmp_path / "out", *arguments) == 0
    told = capsys.readouterr().out.split("result against source: max |logit difference| ")[1]
    assert float(told.split(",")[0]) > 1e-3 and told.endswith(" tokens\n")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["hf", "run", "adapter"])
def test_numbers_that_are_none_are_named(kind, number, source, tmp_path, capsys):
    bad = tmp_path / "bad"
    if kind == "adapter":
        bad.mkdir()
        name = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
        factors = {f"{name}A.weight": np.zeros((2, 16), np.float32), f"{name}B.weight": np.zeros((24, 2), np.float32)}
        factors[f"{name}B.weight"][3] = number
        save_file(factors, bad / "adapter_model.safetensors")
        (bad / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 1, "r": 2}')
        assert convert(source, tmp_path / "out", "--adapter", str(bad)) == 2
        assert_refused(capsys, "model.layers.1.self_attn.q_proj.weight: ")
        return
    from lin_jax.convert.hugging_face import nested
    from lin_jax.convert.hugging_face import read_hugging_face as read
    from lin_jax.experiment import Config
    from lin_jax.train.saved_model import save_model

    if kind == "hf":
        make_directory(bad, LLAMA)
        edit_tensors(
            bad, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].__setitem__((2, slice(0, 3)), number)
        )
        message = "model.layers.1.mlp.up_proj.weight: 3 of "
    else:
        weights = read(source)
        arrays = {**weights.arrays, "norm.weight": weights.arrays["norm.weight"].at[5].set(number)}
        save_model(str(bad), nested(arrays), Config(model=LLAMA), BytesTokenizer())
        message = f"{bad}: 1 of the 16 numbers of norm.weight are NaN or infinite"
    assert convert(bad, tmp_path / "out") == 2
    assert_refused(capsys, message)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_number_too_large_for_float16_is_named(source, tmp_path, capsys):
    bad = make_directory(tmp_path / "bad", LLAMA)
    edit_tensors(bad, lambda tensors: tensors["model.norm.weight"].__setitem__(0, 1e5))
    assert convert(bad, tmp_path / "out", "--to", "hf", "--dtype", "float16") == 2
    assert_refused(capsys, "model.norm.weight: 1 of 16 numbers are NaN or infinite in float16")


@pytest.mark.parametrize(
    "override",
    ["--config.model.dtype=bfloat16", "--config.model.remat=full", "--config.model.attention.implementation=xla"],
)
def test_options_without_an_effect_are_refused(override, source, tmp_path, capsys):
    attention = ("--attention", "augmented") if "implementation" in override else ()
    assert convert(source, tmp_path / "out", "--to", "hf", override, *attention) == 2
    assert_refused(capsys, f"{override} has no effect with --to hf")
    assert not any(tmp_path.iterdir())
    assert convert(source, tmp_path / "run", override, *attention) == 0


MORE = {
    "id2label": {"0": "no", "1": "yes", "2": "maybe"},
    "label2id": {"no": 0, "yes": 1, "maybe": 2},
    "pad_token_id": 3,
    "problem_type": "single_label_classification",
    "bos_token_id": 4,
    "eos_token_id": [256, 7],
    "summary_use_proj": True,
    "an_entry_of_somebody": {"nested": [1, None, "ü"]},
}


@pytest.mark.parametrize("name", MODELS)
def test_entries_that_are_not_of_ours_go_there_and_back(name, tmp_path):
    source = make_directory(tmp_path / "source", MODELS[name])
    before = json.loads((source / "config.json").read_text()) | MORE
    (source / "config.json").write_text(json.dumps(before))
    (source / "generation_config.json").write_text('{"eos_token_id": [256, 7], "temperature": 0.5}')
    for arguments in (("direct", source), ("back", tmp_path / "run")):
        if arguments[0] == "back":
            assert convert(source, tmp_path / "run") == 0
        assert convert(arguments[1], tmp_path / arguments[0], "--to", "hf") == 0
        after = json.loads((tmp_path / arguments[0] / "config.json").read_text())
        assert after == before, arguments
        generation = (tmp_path / arguments[0] / "generation_config.json").read_text()
        assert json.loads(generation) == {"eos_token_id": [256, 7], "temperature": 0.5}
    # What the model decides is written from it, whatever the source said, in whichever of its forms.
    linearized = ("--attention", "augmented", "--config.model.attention.group_size=8", "--to", "hf")
    assert convert(source, tmp_path / "other", *linearized, "--dtype", "bfloat16") == 0
    after = json.loads((tmp_path / "other" / "config.json").read_text())
    assert after["torch_dtype"] == "bfloat16" and after["lin_jax"]["attention"]["group_size"] == 8
    assert after["id2label"] == MORE["id2label"]
    assert load_file(tmp_path / "other" / "model.safetensors").keys() > load_file(source / "model.safetensors").keys()
    plain = ("--attention", "softmax", "--to", "hf")
    assert convert(tmp_path / "other", tmp_path / "plain", *plain) == 0
    assert "lin_jax" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_ids_of_another_tokenizer_are_not_kept(source, tmp_path):
    other = make_directory(tmp_path / "other", LLAMA)
    (other / "config.json").write_text(json.dumps(json.loads((other / "config.json").read_text()) | MORE))
    assert convert(other, tmp_path / "out", "--to", "hf", "--tokenizer", str(source)) == 0
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["eos_token_id"] == 256 and after["bos_token_id"] is None and "pad_token_id" not in after


def test_logits_are_compared_in_full_float32(monkeypatch):
    """Else sound conversions are refused: TF32 moves logits by more than 1e-3."""
    weights, seen = random_weights(LLAMA), []
    plain = Linear.__call__

    def spied(self, x):
        seen.append(jax.config.jax_default_matmul_precision)
        return plain(self, x)

    monkeypatch.setattr(Linear, "__call__", spied)
    monkeypatch.setattr(product, "target", lambda: TargetDevice("gpu", ""))
    logits_of(weights, np.zeros((1, 4), np.int32))
    assert set(seen) == {"highest"}
