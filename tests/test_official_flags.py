"""Every combination of the official flags that ours has settings for, against the official equations in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lin_jax.attentions.augmented import AugmentedConfig
from lin_jax.attentions.longlora import LongloraConfig
from lin_jax.attentions.softmax import SoftmaxConfig
from lin_jax.convert import llama
from lin_jax.convert.flash import config_from_official, from_official, kernel_of, to_official
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.settings.base import ConfigError
from lin_jax.settings.foreign import Fields
from tests.official_flags import (
    UnsupportedFlag,
    added_filters,
    gpt2_attention,
    llama_attention,
    medusa_attention,
)
from tests.official_flash import loss_and_gradients
from tests.official_llama import OfficialLlama
from tests.test_golden import (
    check_close,
    check_gradients,
    flash_loss,
    load_transformer,
    loss_and_gradient,
    loss_of,
    shapes_of,
)

SWITCHES = ("USE_GLOBAL", "GLOBAL_FACTOR", "LOCAL_FACTOR", "USE_CASTLING", "ADD_CONV", "NORM_GLOBAL")
LINEAR = {"USE_LINEAR": 1, "GROUP_SIZE": 4, "split": 4}


def parameters(values: dict, flags: dict, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Those that the official code makes for these flags."""
    V, C, F = values["vocab_size"], values["hidden_size"], values["intermediate_size"]
    H, K = values["num_attention_heads"], values["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, C),
        "model.norm.weight": (C,),
        "lm_head.weight": (V, C),
    }
    for layer in range(values["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}{norm}_layernorm.weight": (C,) for norm in ("input", "post_attention")}
        shapes |= {f"{name}self_attn.{part}_proj.weight": (C, C) for part in "qo"}
        shapes |= {f"{name}self_attn.{part}_proj.weight": (C * K // H, C) for part in "kv"}
        shapes |= {f"{name}mlp.{part}_proj.weight": (F, C) for part in ("gate", "up")}
        shapes |= {f"{name}mlp.down_proj.weight": (C, F)}
        shapes |= {
            f"{name}self_attn.{part}_factor": (1,) for part in ("global", "local") if flags[f"{part.upper()}_FACTOR"]
        }
        if flags["ADD_CONV"] or flags["USE_CASTLING"]:
            shapes[f"{name}self_attn.dwconv.weight"] = (H, 1, 5, 1)
    return {name: random.normal(size=shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}


@settings(max_examples=12)
@given(
    on=st.tuples(*[st.booleans() for _ in SWITCHES]),
    tokens=st.integers(9, 14),
    key_value_heads=st.sampled_from([1, 2]),
)
def test_flags_of_llama(on, tokens, key_value_heads):
    flags = LINEAR | dict(zip(SWITCHES, map(int, on), strict=True))
    values = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": key_value_heads,
        "rms_norm_eps": 1e-6,
        "flags": flags,
    }
    random = np.random.default_rng(tokens)
    theirs, ids = parameters(values, flags, random), random.integers(11, size=(1, tokens))
    exact = OfficialLlama(ids, values)(theirs, "float64")
    attention = llama_attention(flags, shapes_of(theirs), tokens)
    config = llama.config_from_hugging_face(Fields(values, "config.json"), shapes_of(theirs))
    config = dataclasses.replace(config, attention=attention)
    found = load_transformer(config, llama, theirs, max(1, added_filters(flags)))

    def run(model):
        logits = model(jnp.asarray(ids))
        return loss_of(logits, {"ids": ids}), logits

    (loss, logits), gradient = loss_and_gradient(found.model, run)
    check_close(logits, exact.logits)
    assert abs(float(loss) - exact.loss) < 1e-5 * max(1.0, exact.loss)
    check_gradients(found.to_official(gradient), exact.gradients)


@pytest.mark.parametrize(
    "flags",
    [
        LINEAR | {"USE_YOSO": 1, "HASHCODE_LEN": 8},
        LINEAR | {"NORM_TOGETHER": 1},
        {"USE_LINEAR": 0, "split": 4, "NOSHIFT": 1},
        {"USE_LINEAR": 0, "split": 4, "ADD_CONV": 1},
    ],
)
def test_flags_of_llama_that_are_refused(flags):
    name = next(name for name in ("USE_YOSO", "NORM_TOGETHER", "NOSHIFT", "ADD_CONV") if flags.get(name))
    with pytest.raises(UnsupportedFlag, match=name):
        llama_attention(flags, {}, 96)


def test_longlora_counts_the_groups_that_fit():
    assert llama_attention({"USE_LINEAR": 0, "split": 4}, {}, 96) == LongloraConfig(split=4, shift="released")
    # int(98 / 13) = 7 tokens in a group: 14 groups.
    assert llama_attention({"USE_LINEAR": 0, "split": 13}, {}, 98) == LongloraConfig(split=14, shift="released")


FILTERS = {"transformer.h.0.attn.dconv_ada.weight": (4, 1, 63, 1)}


@pytest.mark.parametrize(
    "on, expected",
    [
        ((), SoftmaxConfig()),
        (("CONV", "FLASH_GLOBAL", "FLASH_LOCAL", "GLOBAL_RELU", "NO_FLASH_INF"), SoftmaxConfig()),
        (("LOCAL_ATTN",), AugmentedConfig(group_size=8, grouped=False, convolution=0, grouped_weight="one")),
        (("LOCAL_ATTN", "AUG"), AugmentedConfig(group_size=8, grouped=False, convolution=0, grouped_weight="one")),
        (("AUG",), AugmentedConfig(group_size=8, convolution=32)),
        (("AUG", "BOTH_ATTN", "GLOBAL_ATTN"), AugmentedConfig(group_size=8, convolution=32)),
        (("BOTH_ATTN", "GLOBAL_ATTN"), AugmentedConfig(group_size=8, convolution=0, grouped_weight="one")),
        (("GLOBAL_ATTN",), AugmentedConfig(group_size=8, local="none", convolution=0, grouped_weight="one")),
    ],
)
def test_flags_of_gpt2(on, expected):
    assert gpt2_attention({"GROUP_SIZE": 8} | dict.fromkeys(on, 1), FILTERS) == expected


@pytest.mark.parametrize("name", ["FFNCONV", "LINEAR_HEADS"])
def test_flags_of_gpt2_that_are_refused(name):
    with pytest.raises(UnsupportedFlag, match=name):
        gpt2_attention({"GROUP_SIZE": 8, "AUG": 1, name: 1}, FILTERS)


def test_flags_of_medusa():
    filters = {"model.layers.0.self_attn.dwconv.weight": (4, 1, 63, 1)}
    flags = {"USE_LINEAR": 1, "USE_LOCAL": 1, "GROUP_SIZE": 16}
    plain = AugmentedConfig(group_size=16, grouped=False, convolution=0, grouped_weight="one")
    assert medusa_attention(flags, {}) == plain
    assert medusa_attention(flags | {"ADD_CONV": 1}, filters) == dataclasses.replace(plain, convolution=32)
    grouped = dataclasses.replace(plain, grouped=True)
    assert medusa_attention(flags | {"USE_GLOBAL": 1}, {}) == grouped
    learned = dataclasses.replace(grouped, grouped_weight="learned")
    assert medusa_attention(flags | {"USE_GLOBAL": 1, "GLOBAL_FACTOR": 1}, {}) == learned
    assert medusa_attention({"USE_LINEAR": 0}, {}) == SoftmaxConfig()


OFFICIAL_FLASH = {
    "dim": 8,
    "num_tokens": 11,
    "depth": 1,
    "group_size": 4,
    "query_key_dim": 4,
    "expansion_factor": 2.0,
    "causal": False,
    "norm_type": "scalenorm",
    "shift_tokens": True,
    "laplace_attn_fn": False,
    "kernel": 9,
    "global_": True,
    "local_": True,
    "conv": False,
    "square": False,
    "castling": True,
    "softmax": False,
    "reduce_group_non_causal_attn": True,
    "rotary_dim": 32,
}


def flash_parameters(official: dict, random: np.random.Generator) -> dict[str, np.ndarray]:
    C, V, D = official["dim"], official["num_tokens"], official["query_key_dim"]
    E, heads = int(C * official["expansion_factor"]), 2 if official["softmax"] or official["square"] else 4
    shapes: dict[str, tuple[int, ...]] = {
        "token_emb.weight": (V, C),
        "abs_pos_emb.scale": (1,),
        "to_logits.0.weight": (C,),
        "to_logits.0.bias": (C,),
        "to_logits.1.weight": (V, C),
        "to_logits.1.bias": (V,),
    }
    layer: dict[str, tuple[int, ...]] = {
        "rel_pos_bias.relative_attention_bias.weight": (32, 1),
        "to_hidden.0.weight": (2 * E, C),
        "to_hidden.0.bias": (2 * E,),
        "to_qk.0.weight": (D, C),
        "to_qk.0.bias": (D,),
        "qk_offset_scale.gamma": (heads, D),
        "qk_offset_scale.beta": (heads, D),
        "to_out.weight": (C, E),
        "to_out.bias": (C,),
    }
    layer |= {"norm.g": (1,)} if official["norm_type"] == "scalenorm" else {"norm.weight": (C,), "norm.bias": (C,)}
    if official["conv"]:
        layer["dwconv.weight"] = (1, 1, official["kernel"], 1)
    for index in range(official["depth"]):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return {name: random.normal(size=shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}


@settings(max_examples=16, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_flags_of_flash_with_padding_in_the_wrapper(data):
    switches = ("causal", "shift_tokens", "laplace_attn_fn", "conv", "castling", "local_", "global_")
    official = OFFICIAL_FLASH | {name: data.draw(st.booleans(), label=name) for name in switches}
    official |= {
        "norm_type": data.draw(st.sampled_from(["scalenorm", "layernorm"])),
        data.draw(st.sampled_from(["castling", "softmax", "square"])): True,
        "kernel": data.draw(st.sampled_from([5, 9])) if official["conv"] else None,
        "group_size": data.draw(st.sampled_from([3, 4])),
    }
    # The official code has no model without both.
    official["local_"] |= not official["global_"]
    tokens = data.draw(st.integers(5, 10), label="tokens")
    padding = data.draw(st.lists(st.booleans(), min_size=2 * tokens, max_size=2 * tokens), label="mask")
    random = np.random.default_rng(tokens)
    theirs, ids = flash_parameters(official, random), random.integers(11, size=(2, tokens + 1))
    mask = np.array(padding).reshape(2, tokens)
    loss, logits, gradients = loss_and_gradients(theirs, ids, mask, official)
    # A mask as long as the ids is cut as they are.
    longer = np.pad(mask, ((0, 0), (0, data.draw(st.integers(0, 1)))), constant_values=True)
    arrays, wrapped = {"ids": ids, "mask": longer}, official | {"autoregressive_wrapper": True}
    kernel = kernel_of(shapes_of(theirs))
    model = from_official(config_from_official(official), theirs, kernel)
    (our_loss, our_logits), gradient = loss_and_gradient(model, lambda model: flash_loss(model, wrapped, arrays))
    check_close(our_logits, logits)
    assert abs(float(our_loss) - loss) < 1e-5 * max(1.0, loss)
    check_gradients(to_official(gradient, kernel, parameters_by_path(gradient)), gradients)


def test_flash_refuses_a_grouped_branch_that_sees_its_own_group_alone():
    own = OFFICIAL_FLASH | {"reduce_group_non_causal_attn": False}
    with pytest.raises(ConfigError, match="reduce_group_non_causal_attn"):
        config_from_official(own)
    # Where nothing reads the flag, it does not matter.
    for unread in ({"causal": True}, {"global_": False}, {"softmax": True}, {"square": True}):
        changes = {**OFFICIAL_FLASH, **unread}
        assert config_from_official({**own, **unread}) == config_from_official(changes)
