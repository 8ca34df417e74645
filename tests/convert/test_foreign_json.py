"""Files of JSON that others wrote: every field that is read, with every wrong type, is refused in a line, traceless."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert.test_convert import GPT2, LLAMA, assert_refused, convert, make_directory

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEEP = "[" * 1000 + "]" * 1000
# JSON texts, so that what Python would not write can be given.
WRONG = {
    "text": '"12"',
    "whole": "12",
    "fraction": "1.5",
    "true": "true",
    "list": "[[1]]",
    "object": '{"a": {"b": 1}}',
    "deep": DEEP,
    "surrogate": '"\\ud800"',
    "nul": '"a\\u0000b"',
    "infinity": "Infinity",
    "large": "1" + "0" * 400,
}
NUMBER, FRACTION, FLAG, TEXT, OBJECT = {"whole"}, {"fraction"}, {"true"}, {"text"}, {"object"}
# What each field takes: the wrong types are the others.
LLAMA_FIELDS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), set()),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "intermediate_size"), set()),
    "max_position_embeddings": NUMBER,
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), NUMBER | FRACTION),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), FLAG),
    **dict.fromkeys(("hidden_act", "model_type"), set()),
    **dict.fromkeys(("dtype", "torch_dtype"), TEXT),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), OBJECT),
    **dict.fromkeys(("lin_jax", "quantization_config"), set()),
    "eos_token_id": NUMBER,
}
GPT2_FIELDS = {
    **dict.fromkeys(("vocab_size", "n_embd", "n_layer", "n_head", "n_inner"), set()),
    "n_positions": set(),
    "layer_norm_epsilon": NUMBER | FRACTION,
    "scale_attn_by_inverse_layer_idx": set(),
    **dict.fromkeys(("scale_attn_weights", "tie_word_embeddings"), FLAG),
    "activation_function": set(),
}
ADAPTER_FIELDS = {
    "peft_type": set(),
    "r": set(),
    "lora_alpha": NUMBER | FRACTION,
    "use_rslora": FLAG,
    "ensure_weight_tying": FLAG,
    "init_lora_weights": FLAG,
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save"), set()),
}
CASES = [
    *(("llama", "config.json", field, taken) for field, taken in LLAMA_FIELDS.items()),
    *(("gpt2", "config.json", field, taken) for field, taken in GPT2_FIELDS.items()),
    ("llama", "generation_config.json", "eos_token_id", NUMBER),
    ("llama", "model.safetensors.index.json", "weight_map", set()),
    *(("adapter", "adapter_config.json", field, taken) for field, taken in ADAPTER_FIELDS.items()),
]
# Objects whose members are not looked at: any is right.
INNER = {
    "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 32},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("foreign")
    found = {name: make_directory(root / name, config) for name, config in (("llama", LLAMA), ("gpt2", GPT2))}
    found["adapter"] = root / "adapter"
    found["adapter"].mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{module}A.weight": np.ones((2, 16), np.float32), f"{module}B.weight": np.ones((24, 2), np.float32)}
    save_file(tensors, found["adapter"] / "adapter_model.safetensors")
    (found["adapter"] / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    return found


def write(file, field, text):
    """Put a value, as the text of its JSON, into a file."""
    values = json.loads(file.read_text()) if file.exists() else {}
    values[field] = "HERE"
    file.write_text(json.dumps(values).replace('"HERE"', text), encoding="utf-8")


def assert_all_refused(directories, case, tmp_path, capsys, texts, put=write):
    owner, name, field, _ = case
    bad = tmp_path / "bad"
    for text in texts:
        shutil.copytree(directories[owner], bad)
        if name.endswith("index.json"):
            shutil.move(bad / "model.safetensors", bad / "model-00001-of-00001.safetensors")
        put(bad / name, field, text)
        arguments = (directories["llama"], tmp_path / "out", "--adapter", str(bad))
        assert convert(*(arguments if owner == "adapter" else (bad, tmp_path / "out"))) == 2, (case, text[:80])
        assert_refused(capsys, "error: ")
        assert [path.name for path in tmp_path.iterdir()] == ["bad"], (case, text[:80])
        shutil.rmtree(bad)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case[:3]))
def test_a_field_of_a_wrong_type(directories, case, tmp_path, capsys):
    assert_all_refused(directories, case, tmp_path, capsys, [WRONG[name] for name in WRONG.keys() - case[3]])


SCALINGS = {
    "rope_type": set(),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "rope_theta"), NUMBER | FRACTION),
    "original_max_position_embeddings": NUMBER,
}
ROPE = [("llama", "config.json", field, taken) for field, taken in SCALINGS.items()]


@pytest.mark.parametrize("case", ROPE, ids=lambda case: case[2])
def test_a_member_of_a_wrong_type(directories, case, tmp_path, capsys):
    def put(file, field, text):
        values = json.loads(file.read_text())
        values["rope_scaling"] = {**INNER["rope_scaling"], field: "HERE"}
        file.write_text(json.dumps(values).replace('"HERE"', text), encoding="utf-8")

    assert_all_refused(directories, case, tmp_path, capsys, [WRONG[name] for name in WRONG.keys() - case[3]], put)


NO_OBJECTS = ["", "{", "null", "12", '"text"', "[]", DEEP, "{}x", "\x00"]
NO_JSON = ['{"a": NaN}', '{"a": 1, "a": 2}', '{"a": "\\udc00"}']
FILES = sorted({(owner, name) for owner, name, *_ in CASES})
TOKENIZERS = [("llama", "tokenizer_config.json"), ("llama", "tokenizer.json")]


@pytest.mark.parametrize(("owner", "name"), FILES + TOKENIZERS, ids="-".join)
def test_a_file_that_is_no_object(directories, owner, name, tmp_path, capsys):
    texts = NO_OBJECTS + (NO_JSON if (owner, name) in FILES else [])
    put = lambda file, field, text: file.write_text(text)  # noqa: E731
    assert_all_refused(directories, (owner, name, "", set()), tmp_path, capsys, texts, put)
