"""Speculation compared with plain decoding: the same texts, what is counted, a state for every candidate, bad input."""

import codecs
import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eval as eval_program
from lin_jax.data.tokenizers import BytesTokenizer
from lin_jax.decode.generate import Generator
from lin_jax.evaluate.direct import DirectIntegration
from lin_jax.evaluate.speculative import compare_attentions, encode_prompts, read_texts, table, with_attention
from lin_jax.experiment import (
    AugmentedConfig,
    Config,
    ConfigError,
    GenerateConfig,
    LlamaConfig,
    MedusaConfig,
    SoftmaxConfig,
)
from lin_jax.models.medusa import start_heads
from lin_jax.models.registry import create_model
from lin_jax.ops.tree import tree_from_paths
from lin_jax.train.saved_model import save_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = LlamaConfig(
    vocabulary_size=257,
    width=16,
    depth=1,
    heads=2,
    key_value_heads=1,
    head_size=8,
    feed_forward_size=24,
    attention=AugmentedConfig(local="softmax", group_size=4, convolution=3),
)
PATHS = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]
PROMPTS = [np.arange(length, dtype=np.int32) + 40 for length in (1, 5, 9)]


@pytest.fixture(scope="module")
def model():
    made = create_model(MODEL, nnx.Rngs(3))
    for _, variable in nnx.to_flat_state(nnx.state(made, nnx.Param)):
        variable.set_value(3 * variable.get_value() + 0.02)
    made.medusa = start_heads(MedusaConfig(heads=3), made, nnx.Rngs(0))
    return made


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("tree") / "tree.json"
    file.write_text(json.dumps(PATHS))
    return GenerateConfig(max_new_tokens=14, batch_size=2, block=4, tree=str(file))


@pytest.fixture(scope="module")
def rows(model, config):
    methods = ("medusa", "direct")
    return compare_attentions(
        model, BytesTokenizer(), PROMPTS, config, methods=methods, names=("augmented", "softmax"), report=lambda x: None
    )


def test_every_method_writes_the_same_and_what_it_took_is_counted(rows):
    assert [(row.attention, row.method) for row in rows] == [
        (attention, method) for attention in ("augmented", "softmax") for method in ("plain", "medusa", "direct")
    ]
    for row in rows:
        plain = next(other for other in rows if other.attention == row.attention and other.method == "plain")
        assert row.differing == 0 and row.tokens == plain.tokens <= 3 * 14
        assert row.steps <= plain.steps == plain.tokens and row.seconds > 0
    assert sum(row.steps for row in rows if row.method == "medusa") < sum(
        row.steps for row in rows if row.method == "plain"
    )


def test_a_state_for_every_candidate_takes_as_many_times_the_memory(rows):
    leaves = len(tree_from_paths(PATHS).leaves)
    assert leaves == 4
    for attention in ("augmented", "softmax"):
        of = {row.method: row for row in rows if row.attention == attention}
        assert of["direct"].steps == of["medusa"].steps
        np.testing.assert_allclose(of["direct"].state_bytes / of["medusa"].state_bytes, leaves, rtol=0.01)


def test_candidates_apart_have_the_features_of_the_tree(model):
    tree = tree_from_paths(PATHS)
    direct = DirectIntegration(model, tree)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 6)), jnp.int32)
    nodes = jnp.asarray(np.random.default_rng(1).integers(0, 257, (2, tree.nodes)), jnp.int32)
    path, count = jnp.array([[0, 1, 4, 4], [0, 2, 6, 6]]), jnp.array([3, 1])

    def run(of):
        state = of.forward(tokens, of.empty_state(2, 32))[1]
        x_BMC, pending = of.verify(nodes, tree, state)
        after = of.commit(state, pending, path, count)
        return x_BMC, of.verify(nodes, tree, after)[0], after.length_B

    for shared, own in zip(jax.jit(lambda: run(model))(), jax.jit(lambda: run(direct))(), strict=True):
        np.testing.assert_allclose(shared, own, atol=1e-4)


def test_an_ablation_is_the_model_with_another_attention_and_the_same_parameters(model):
    other = with_attention(model, "softmax")
    plain = dataclasses.replace(MODEL, attention=SoftmaxConfig())
    expected = create_model(plain, nnx.Rngs(0))
    values = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    nnx.update(expected, nnx.from_flat_state([(p, values[p]) for p, _ in nnx.to_flat_state(nnx.state(expected))]))
    tokens = jax.random.randint(jax.random.key(0), (1, 11), 0, 257)
    np.testing.assert_allclose(other(tokens), expected(tokens), atol=1e-5)
    assert np.abs(np.asarray(other(tokens) - model(tokens))).max() > 1e-3


def test_the_parts_of_a_step_are_timed(model, config):
    found = compare_attentions(
        model, BytesTokenizer(), PROMPTS[:1], config, methods=["medusa"], split=True, report=lambda x: None
    )
    for row in found:
        assert list(row.parts) == ["attention", "feed-forward", "heads", "rest", "step"]
        np.testing.assert_allclose(sum(list(row.parts.values())[:4]), row.parts["step"])
        assert (row.parts["heads"] > 0) == (row.method == "medusa") and row.parts["feed-forward"] > 0
    lines = table(found).splitlines()
    assert len(lines) == 4 + 1 + 4 and "| augmented | medusa |" in lines[3]


def test_prompts_of_lines_and_of_a_text(tmp_path):
    tokenizer = BytesTokenizer()
    lines = [{"turns": ["one", "more"]}, {"prompt": "seventeen", "text": "no"}, {"prompt": None, "text": "x"}]
    for name, text in (("p.jsonl", "\n".join(map(json.dumps, lines))), ("p.txt", "one##seventeen\n##x")):
        (tmp_path / name).write_text(text)
        texts = read_texts(tmp_path / name, "##")
        assert texts == ["one", "seventeen", "x"]
        found = encode_prompts(texts, tokenizer, limit=0, longest=4)
        assert [x.tolist() for x in found] == [tokenizer.encode(text)[:4].tolist() for text in texts]
        assert len(encode_prompts(texts, tokenizer, limit=1, longest=4)) == 1


def test_only_line_feeds_end_lines_and_a_mark_of_byte_order_is_no_text(tmp_path):
    texts = ["a\u2028b", "c\u0085d", "e\u2029f", "g\x0bh", "i\x0cj", "k\x1cl"]
    raw = "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n" for text in texts)
    (tmp_path / "p.jsonl").write_bytes(codecs.BOM_UTF8 + raw.encode())
    assert read_texts(tmp_path / "p.jsonl", "##") == texts
    (tmp_path / "p.txt").write_bytes(codecs.BOM_UTF8 + "##".join(texts).encode())
    assert read_texts(tmp_path / "p.txt", "##") == texts


NO_PROMPTS = ["", '{"a": 1}', "[1]", '{"turns": []}', "{", '{"turns": "a"}', '{"turns": [1]}', '{"turns": {}}']
NO_PROMPTS += ['{"prompt": 1}', '{"text": ["a"]}', '{"prompt": true}', '{"text": {}}', "null", '{"text": "\\ud800"}']
NO_PROMPTS += ['{"text": ' + "[" * 1000 + "]" * 1000 + "}", '{"prompt": " "}', '{"prompt": null}', '{"text": 1e999}']


@pytest.mark.parametrize("text", NO_PROMPTS)
def test_a_file_without_prompts_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match="prompts.jsonl") as error:
        read_texts(file, "##")
    assert "\n" not in str(error.value)


def test_prompts_are_in_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    cases = {"absent.jsonl": "does not exist", "pipe.txt": "is not a file", "latin.txt": "is not UTF-8"}
    for name, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            read_texts(tmp_path / name, "##")


def test_the_program(model, config, tmp_path, capsys):
    """Heads are asked for where there are none; plain decoding and lookup need none."""
    parameters = nnx.to_pure_dict(nnx.state(with_attention(model, "augmented"), nnx.Param))
    save_model(str(tmp_path / "run"), parameters, Config(model=MODEL), BytesTokenizer())
    (tmp_path / "prompts.txt").write_text("one##two")
    arguments = ["--task", "speculative", "--checkpoint", str(tmp_path / "run"), "--separator", "##"]
    assert eval_program.main(arguments) == 2 and "--prompts FILE" in capsys.readouterr().err
    arguments += ["--prompts", str(tmp_path / "prompts.txt"), "--max_new_tokens", "4", "--batch_size", "2"]
    assert eval_program.main(arguments) == 2 and "Medusa heads" in capsys.readouterr().err
    assert eval_program.main([*arguments, "--config.data.seed=1"]) == 2 and "unknown" in capsys.readouterr().err
    assert eval_program.main([*arguments, "--methods", "lookup"]) == 0
    assert "| augmented | lookup |" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "speculative.json").read_text())
    assert [row["method"] for row in record["rows"]] == ["plain", "lookup"]


def test_a_tree_deeper_than_the_heads_is_refused(model, config, tmp_path):
    (tmp_path / "deep.json").write_text("[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]")
    settings = dataclasses.replace(config, draft="medusa", tree=str(tmp_path / "deep.json"))
    with pytest.raises(ConfigError, match="4 guesses deep, but the model has 3"):
        Generator(model, settings, heads=model.medusa)
