"""BERT and T5 from and to Hugging Face's form: names old and new, heads, and back bit for bit."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert_weights
from lin_jax.convert.hugging_face import read_hugging_face, read_model_settings, write_hugging_face
from lin_jax.experiment import AugmentedConfig, ConfigError
from tests.golden import golden_cases

BERT = {
    "model_type": "bert",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 6,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 11,
    "d_model": 6,
    "d_kv": 4,
    "d_ff": 10,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "tie_word_embeddings": False,
    "feed_forward_proj": "gated-gelu",
}


def numbers(shapes):
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def bert_shapes(*heads, prefix="bert.", norm=("weight", "bias")):
    def linear(name, inputs, outputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def layer_norm(name):
        return {f"{name}.LayerNorm.{part}": (8,) for part in norm}

    found = {f"embeddings.{name}_embeddings.weight": (size, 8) for name, size in (("word", 11), ("position", 6))}
    found |= {"embeddings.token_type_embeddings.weight": (2, 8), **layer_norm("embeddings")}
    for layer in range(2):
        inside = f"encoder.layer.{layer}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            found |= linear(inside + name, 8, 8)
        found |= linear(f"{inside}intermediate.dense", 8, 12) | linear(f"{inside}output.dense", 12, 8)
        found |= layer_norm(f"{inside}attention.output") | layer_norm(f"{inside}output")
    if "pooler" in heads:
        found |= linear("pooler.dense", 8, 8)
    found = {prefix + name: shape for name, shape in found.items()}
    if "mlm" in heads:
        found |= linear("cls.predictions.transform.dense", 8, 8) | layer_norm("cls.predictions.transform")
        found |= {"cls.predictions.bias": (11,)}
    if "nsp" in heads:
        found |= linear("cls.seq_relationship", 8, 2)
    if "classes" in heads:
        found |= linear("classifier", 8, 3)
    return found


def save(directory, config, tensors):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def back(source, target):
    """The tensors and the config.json of a directory after both ways."""
    target.mkdir()
    write_hugging_face(target, read_hugging_face(source), None, json.loads((source / "config.json").read_text()))
    return load_file(target / "model.safetensors"), json.loads((target / "config.json").read_text())


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    ("heads", "prefix", "architecture"),
    [
        (("pooler",), "", "BertModel"),
        ((), "", "BertModel"),
        (("mlm",), "bert.", "BertForMaskedLM"),
        (("pooler", "mlm", "nsp"), "bert.", "BertForPreTraining"),
        (("pooler", "classes"), "bert.", "BertForSequenceClassification"),
    ],
)
def test_each_bert_goes_back_bit_for_bit(tmp_path, heads, prefix, architecture):
    tensors = numbers(bert_shapes(*heads, prefix=prefix))
    found, config = back(save(tmp_path / "source", BERT, tensors), tmp_path / "target")
    assert_same(found, tensors)
    assert config["architectures"] == [architecture]
    ours = read_model_settings(tmp_path / "target")
    assert ours == read_model_settings(tmp_path / "source")
    assert (ours.pooler, ours.masked_head, ours.next_sentence) == tuple(h in heads for h in ("pooler", "mlm", "nsp"))


def test_old_names_are_read(tmp_path):
    """gamma and beta, a prefix without a head, copies of what is tied, and numbers of positions."""
    today = numbers(bert_shapes("pooler", "mlm"))
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in today.items()
    }
    more = {
        "bert.embeddings.position_ids": np.arange(6)[None],
        "cls.predictions.decoder.weight": today["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": today["cls.predictions.bias"],
    }
    found, _ = back(save(tmp_path / "old", BERT, old | more), tmp_path / "target")
    assert_same(found, today)
    without = {name: array for name, array in today.items() if not name.startswith("cls.")}
    found, config = back(save(tmp_path / "prefix", BERT, without), tmp_path / "plain")
    assert_same(found, {name.removeprefix("bert."): array for name, array in without.items()})
    assert config["architectures"] == ["BertModel"]


def test_a_head_of_its_own_is_kept(tmp_path):
    tensors = numbers(bert_shapes("mlm") | {"cls.predictions.decoder.weight": (11, 8)})
    found, config = back(save(tmp_path / "source", BERT, tensors), tmp_path / "target")
    assert_same(found, tensors)
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_act": "silu"}, "hidden_act=silu is not supported; there are gelu, gelu_new, relu"),
        ({"position_embedding_type": "relative_key"}, "only absolute"),
        ({"is_decoder": True}, "is_decoder=true is not supported"),
    ],
)
def test_what_no_bert_of_ours_has_is_refused(tmp_path, change, told):
    directory = save(tmp_path / "source", BERT | change, numbers(bert_shapes(prefix="")))
    with pytest.raises(ConfigError, match=told):
        read_hugging_face(directory)


def test_a_linearized_bert_goes_back_with_its_attention(tmp_path):
    save(tmp_path / "source", BERT, numbers(bert_shapes("pooler", prefix="")))
    (tmp_path / "source" / "tokenizer.json").write_text(_tokenizer())
    (tmp_path / "source" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "sep_token": "[SEP]"}'
    )
    told = ["--input", str(tmp_path / "source"), "--attention", "augmented"]
    attention = ["--config.model.attention.group_size=4", "--config.model.attention.convolution=3"]
    arguments = [*told, *attention, "--output", str(tmp_path / "hf"), "--to", "hf"]
    assert convert_weights.main(arguments) == 0
    found = read_model_settings(tmp_path / "hf")
    assert found.attention == AugmentedConfig(group_size=4, convolution=3, causal=False)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors["encoder.layer.1.attention.self.dwconv.weight"].shape == (2, 1, 5, 1)
    assert tensors["encoder.layer.0.attention.self.alpha"].shape == (1,)
    again, _ = back(tmp_path / "hf", tmp_path / "again")
    assert_same(again, tensors)


def _tokenizer():
    import tokenizers

    names = ["[PAD]", "[UNK]", "[SEP]", *"abcdefgh"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return backend.to_str()


def t5_shapes():
    found = {"shared.weight": (11, 6), "lm_head.weight": (11, 6)}
    for stack, depth in (("encoder", 1), ("decoder", 2)):
        found[f"{stack}.final_layer_norm.weight"] = (6,)
        found[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (8, 2)
        for layer in range(depth):
            parts = ["SelfAttention", *(["EncDecAttention"] if stack == "decoder" else [])]
            for place, part in enumerate(parts):
                inside = f"{stack}.block.{layer}.layer.{place}."
                found |= {f"{inside}{part}.{name}.weight": (8, 6) for name in "qkv"}
                found |= {f"{inside}{part}.o.weight": (6, 8), f"{inside}layer_norm.weight": (6,)}
            inside = f"{stack}.block.{layer}.layer.{len(parts)}."
            found |= {f"{inside}DenseReluDense.{name}.weight": (10, 6) for name in ("wi_0", "wi_1")}
            found |= {f"{inside}DenseReluDense.wo.weight": (6, 10), f"{inside}layer_norm.weight": (6,)}
    return found


def test_t5_of_unequal_depths_goes_back_bit_for_bit(tmp_path):
    tensors = numbers(t5_shapes())
    copies = {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder", "decoder")}
    unread = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.zeros((8, 2), np.float32)}
    found, config = back(save(tmp_path / "source", T5, tensors | copies | unread), tmp_path / "target")
    assert_same(found, tensors)
    assert (config["num_layers"], config["num_decoder_layers"]) == (1, 2)
    ours = read_model_settings(tmp_path / "target")
    assert (ours.encoder_depth, ours.depth, ours.head_size, ours.tie_embeddings) == (1, 2, 4, False)
    assert not ours.scale_head and ours == read_model_settings(tmp_path / "source")


def test_what_no_t5_of_ours_has_is_refused(tmp_path):
    directory = save(tmp_path / "source", T5 | {"feed_forward_proj": "gated-silu"}, numbers(t5_shapes()))
    with pytest.raises(ConfigError, match="feed_forward_proj=gated-silu is not supported"):
        read_hugging_face(directory)


def test_what_transformers_wrote_goes_back_bit_for_bit(tmp_path):
    """Every directory of it beside the golden vectors that is of an encoder."""
    cases = [case for case in golden_cases() if case.path.is_dir() and case.config["model_type"] in ("bert", "t5")]
    if not cases:
        pytest.skip("no golden directory: set LIN_JAX_GOLDEN")
    for case in cases:
        found, _ = back(case.path, tmp_path / case.name)
        assert_same(found, load_file(case.path / "model.safetensors"))
