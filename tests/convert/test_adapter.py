"""Adapters of PEFT: what its settings mean, in files as it writes them, and methods that are refused by name."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lin_jax.convert.adapter import Adapted
from lin_jax.convert.hugging_face import read_hugging_face
from lin_jax.convert.tensors import Held
from lin_jax.settings.base import ConfigError
from tests.convert.test_convert import GPT2, LLAMA, make_directory

PREFIX = "base_model.model."
RANK = 2
# What PEFT 0.21 writes for a plain LoRA.
PLAIN = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "somewhere",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": RANK,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# Each is another method, or another model, than the factors alone tell.
OTHER_METHODS = {
    "use_dora": True,
    "use_qalora": True,
    "lora_bias": True,
    "alora_invocation_tokens": [261, 378],
    "layer_replication": [[0, 2], [1, 3]],
    "trainable_token_indices": {"embed_tokens": [4, 5]},
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "megatron_config": {"tensor_parallel": 2},
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArB2r"},
    "monteclora_config": {"num_samples": 8},
    "kasa_config": {"beta": 1e-4},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "velora_config": {"num_groups": 2},
    "a_method_of_next_year": {"rate": 2},
}
OTHER_STARTS = ["pissa", "pissa_niter_4", "olora", "OLoRA", "loftq", "corda", "mica", "lora_ga", "of_next_year"]


def factors(random, module, inputs, outputs, kind="", rank=RANK):
    end = "" if kind else ".weight"
    return {
        f"{PREFIX}{module}.lora_{kind}A{end}": random.normal(size=(rank, inputs)).astype(np.float32),
        f"{PREFIX}{module}.lora_{kind}B{end}": random.normal(size=(outputs, rank)).astype(np.float32),
    }


def write_adapter(directory, tensors, **changed):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({**PLAIN, **changed}), encoding="utf-8")
    return directory


def update(tensors, module, scale, kind=""):
    end = "" if kind else ".weight"
    a, b = (tensors[f"{PREFIX}{module}.lora_{kind}{part}{end}"].astype(np.float64) for part in "AB")
    return scale * b @ a


Q, OTHER_Q = "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj"


def merged(tmp_path, tensors, base, **changed):
    return Adapted(Held(base), write_adapter(tmp_path / "adapter", tensors, **changed))


@pytest.fixture
def one(tmp_path):
    """An update of one matrix, and what it is of."""
    random = np.random.default_rng(0)
    return factors(random, Q, 6, 4), {f"{Q}.weight": random.normal(size=(4, 6)).astype(np.float32)}


@pytest.mark.parametrize("setting", OTHER_METHODS)
def test_other_methods_are_refused_by_name(setting, one, tmp_path):
    with pytest.raises(ConfigError, match=rf"adapter_config.json: {setting}=.* is not supported") as error:
        merged(tmp_path, *one, **{setting: OTHER_METHODS[setting]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("start", OTHER_STARTS)
def test_starts_that_change_the_model_are_refused_by_name(start, one, tmp_path):
    with pytest.raises(ConfigError, match=f"init_lora_weights={start} is not supported"):
        merged(tmp_path, *one, init_lora_weights=start)


HARMLESS = [{"init_lora_weights": start} for start in (True, False, "gaussian", "eva", "orthogonal")] + [
    {"lora_dropout": 0.3},
    {"exclude_modules": ["v_proj"]},
    {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ".*q_proj"},
    {"fan_in_fan_out": True},  # PEFT turns it off for modules that are no Conv1D
    {"bias": "all"},
    {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
    {"of_next_year": None, "and_the_year_after": []},
]


@pytest.mark.parametrize("changed", HARMLESS, ids=str)
def test_what_does_not_change_the_sum(changed, one, tmp_path):
    tensors, base = one
    found = merged(tmp_path, tensors, base, **changed)[f"{Q}.weight"]
    np.testing.assert_allclose(found, base[f"{Q}.weight"] + update(tensors, Q, 4.0), rtol=1e-5, atol=1e-5)


KEYS = (
    "q_proj",
    r"layers\.0\..*",
    "self_attn.q_proj",
    "layers.11.self_attn.q_proj",
    "v_proj",
    "^model.*q_proj",
)


def first_match(patterns, module):
    """PEFT's rule, by hand: the key, as a regular expression, is the module's name or its end after a dot."""
    import re

    for key, value in patterns:
        ends = [module] + [module[at + 1 :] for at, letter in enumerate(module) if letter == "."]
        if any(re.fullmatch(key, end) for end in ends):
            return value
    return None


@settings(deadline=None, max_examples=100)
@given(
    alphas=st.lists(st.tuples(st.sampled_from(KEYS), st.integers(1, 64)), max_size=5, unique_by=lambda pair: pair[0]),
    rslora=st.booleans(),
)
def test_the_first_pattern_that_matches_decides(tmp_path_factory, alphas, rslora):
    directory = tmp_path_factory.mktemp("adapter")
    random = np.random.default_rng(1)
    base = {f"{module}.weight": random.normal(size=(4, 6)).astype(np.float32) for module in (Q, OTHER_Q)}
    ranks = {Q: 3, OTHER_Q: 2}
    tensors = factors(random, Q, 6, 4, rank=3) | factors(random, OTHER_Q, 6, 4, rank=2)
    found = merged(
        directory,
        tensors,
        base,
        alpha_pattern=dict(alphas),
        rank_pattern={"layers.0.self_attn.q_proj": 3, "q_proj": 2},
        use_rslora=rslora,
    )
    for module, rank in ranks.items():
        alpha = first_match(alphas, module) or PLAIN["lora_alpha"]
        expected = base[f"{module}.weight"] + update(tensors, module, alpha / (math.sqrt(rank) if rslora else rank))
        np.testing.assert_allclose(found[f"{module}.weight"], expected, rtol=1e-4, atol=1e-4)


def test_ranks_that_disagree_with_the_settings_are_refused(one, tmp_path):
    for changed in ({"r": 4}, {"rank_pattern": {"q_proj": 4}}):
        with pytest.raises(ConfigError, match=f"the factors of {Q} have rank 2, but its settings say 4"):
            merged(tmp_path, *one, **changed)


def test_the_kind_of_a_module_says_which_way_its_matrix_lies(tmp_path):
    """GPT-2's Conv1D, square ones too, and its classifier, which is no Conv1D, in one adapter."""
    base = make_directory(tmp_path / "base", dataclasses.replace(GPT2, labels=3))
    random = np.random.default_rng(2)
    shapes = {"transformer.h.1.attn.c_proj": (16, 16), "transformer.h.0.mlp.c_fc": (16, 24), "score": (16, 3)}
    tensors = {}
    for module, (inputs, outputs) in shapes.items():
        tensors |= factors(random, module, inputs, outputs)
    before = load_file(base / "model.safetensors")
    for fan_in_fan_out in (True, False):
        adapter = write_adapter(tmp_path / "adapter", tensors, fan_in_fan_out=fan_in_fan_out)
        arrays = read_hugging_face(base, adapter).arrays
        found = {
            "transformer.h.1.attn.c_proj": arrays["layers.output.kernel"][1],
            "transformer.h.0.mlp.c_fc": arrays["layers.up.kernel"][0],
            "score": arrays["score.kernel"],
        }
        for module, ours in found.items():
            theirs = before[f"{module}.weight"]
            expected = (theirs.T if module == "score" else theirs) + update(tensors, module, 4.0).T
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


EMBEDDING = "model.embed_tokens"
FAMILIES = {"llama": (LLAMA, EMBEDDING), "gpt2": (GPT2, "transformer.wte")}


@pytest.fixture(params=[(family, tied) for family in FAMILIES for tied in (True, False)], ids=str, scope="module")
def model(request, tmp_path_factory):
    """A directory, its embedding's name, and its embedding and head as PEFT sees them."""
    (config, embedding), tied = FAMILIES[request.param[0]], request.param[1]
    config = dataclasses.replace(config, tie_embeddings=tied)
    directory = make_directory(tmp_path_factory.mktemp("model") / "base", config)
    tensors = load_file(directory / "model.safetensors")
    table = tensors[f"{embedding}.weight"]
    return directory, embedding, table, tensors.get("lm_head.weight", table), tied


def head_of(weights):
    return weights.arrays["embedding" if weights.config.tie_embeddings else "logits.kernel"]


def assert_is(weights, table_VC, head_VC):
    head = np.asarray(head_of(weights))
    head = head if weights.config.tie_embeddings else head.T
    np.testing.assert_allclose(weights.arrays["embedding"], table_VC, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(head, head_VC, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("saves_base", [False, True])
def test_lora_on_the_embedding(saves_base, model, tmp_path):
    """PEFT then saves the matrix below the factors too; the head goes on with the embedding as it was."""
    directory, embedding, table, head, _ = model
    tensors = factors(np.random.default_rng(3), embedding, 300, 16, "embedding_")
    if saves_base:
        tensors[f"{PREFIX}{embedding}.base_layer.weight"] = table
    weights = read_hugging_face(directory, write_adapter(tmp_path / "adapter", tensors))
    assert_is(weights, table + update(tensors, embedding, 4.0, "embedding_").T, head)


@pytest.mark.parametrize("saves_base", [False, True])
def test_lora_on_the_head(saves_base, model, tmp_path):
    directory, _, table, head, _ = model
    tensors = factors(np.random.default_rng(4), "lm_head", 16, 300)
    if saves_base:
        tensors[f"{PREFIX}lm_head.base_layer.weight"] = head
    weights = read_hugging_face(directory, write_adapter(tmp_path / "adapter", tensors))
    assert_is(weights, table, head + update(tensors, "lm_head", 4.0))


def test_an_update_is_of_the_matrix_that_was_saved_with_it(model, tmp_path):
    directory, embedding, table, head, _ = model
    tensors = factors(np.random.default_rng(5), embedding, 300, 16, "embedding_")
    tensors[f"{PREFIX}{embedding}.base_layer.weight"] = table + 1
    weights = read_hugging_face(directory, write_adapter(tmp_path / "adapter", tensors))
    assert_is(weights, table + 1 + update(tensors, embedding, 4.0, "embedding_").T, head)


@pytest.mark.parametrize("saved", [("embedding",), ("head",), ("embedding", "head")], ids="-".join)
def test_modules_to_save(saved, model, tmp_path):
    directory, embedding, table, head, _ = model
    names = {"embedding": embedding, "head": "lm_head"}
    tensors = {f"{PREFIX}{names[part]}.weight": np.full((300, 16), len(part), np.float32) for part in saved}
    if len(saved) == 2:
        tensors[f"{PREFIX}lm_head.weight"][7] = 3
    modules = [names[part].rpartition(".")[2] for part in saved]
    weights = read_hugging_face(directory, write_adapter(tmp_path / "adapter", tensors, modules_to_save=modules))
    expected = [tensors.get(f"{PREFIX}{name}.weight", old) for name, old in ((embedding, table), ("lm_head", head))]
    assert_is(weights, *expected)


def test_ensured_ties_hold(model, tmp_path):
    directory, embedding, table, head, tied = model
    tensors = factors(np.random.default_rng(6), embedding, 300, 16, "embedding_")
    weights = read_hugging_face(directory, write_adapter(tmp_path / "adapter", tensors, ensure_weight_tying=True))
    table = table + update(tensors, embedding, 4.0, "embedding_").T
    assert weights.config.tie_embeddings == tied
    assert_is(weights, table, table if tied else head)


def test_an_adapter_of_other_modules_leaves_the_tie(model, tmp_path):
    directory, _, table, head, tied = model
    module = "transformer.h.0.mlp.c_proj" if "transformer" in model[1] else "model.layers.0.mlp.down_proj"
    tensors = factors(np.random.default_rng(7), module, 24, 16)
    weights = read_hugging_face(directory, write_adapter(tmp_path / "adapter", tensors))
    assert weights.config.tie_embeddings == tied
    assert_is(weights, table, head)
