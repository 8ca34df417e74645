"""Generation with a real checkpoint: speculation gives the very tokens of plain decoding; texts, stops and errors."""

import dataclasses
import sys
from subprocess import run

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lin_jax
from lin_jax.convert.medusa import read_heads, write_heads
from lin_jax.decode.generate import Generator, generate_tokens
from lin_jax.decode.text import TextGenerator, make_config
from lin_jax.experiment import AugmentedConfig, ConfigError, GenerateConfig, MedusaConfig, SamplingConfig
from lin_jax.models.medusa import MedusaHeads, start_heads
from lin_jax.models.registry import create_model
from lin_jax.ops import product
from lin_jax.ops.target import TargetDevice
from tests.golden import ROOT

pytestmark = pytest.mark.usefixtures("quick_compilation")

STORIES = ROOT / "../shared/data/stories260k_hf"
PROMPTS = [
    "Once upon a time",
    "Lily and Ben went to the park. Lily and Ben went to",
    "Tom",
    "One day, a big dog saw a cat. The",
]


@pytest.fixture(scope="module")
def stories():
    if not STORIES.is_dir():
        pytest.skip(f"no checkpoint at {STORIES}")
    return lin_jax.load(STORIES)


def linearized(model):
    """The checkpoint with augmented attention: new parameters far from 0, text still text-like."""
    attention = AugmentedConfig(group_size=8, local="softmax", local_groups=2, convolution=4)
    other = create_model(dataclasses.replace(model.config, attention=attention), nnx.Rngs(0))
    old = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    new = [
        (path, old.get(path, leaf.replace(leaf[...] + 0.02)))
        for path, leaf in nnx.to_flat_state(nnx.state(other, nnx.Param))
    ]
    nnx.update(other, nnx.from_flat_state(new))
    return other


@pytest.fixture(scope="module")
def augmented(stories):
    return linearized(stories[0])


@pytest.fixture(scope="module", params=["softmax", "augmented"])
def model(request, stories, augmented):
    return stories[0] if request.param == "softmax" else augmented


@pytest.fixture(scope="module")
def ids(stories):
    return [np.concatenate([[1], stories[1].encode(prompt)]).astype(np.int32) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def heads(stories):
    """Heads that guess a word again and again, so now and then one is right."""
    return start_heads(MedusaConfig(heads=4), stories[0], nnx.Rngs(0))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The file of a small tree as deep as the heads; published ones take most of their time here to be sorted."""
    file = tmp_path_factory.mktemp("tree") / "tree.json"
    file.write_text("[[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0, 0]]")
    return str(file)


def recomputed(model, prompt, count):
    """Greedy tokens, the whole prefix read again for each."""
    tokens = list(prompt)
    features = nnx.jit(lambda model, row: model(row))
    for _ in range(count):
        row = np.zeros((1, 64), np.int32)
        row[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(features(model, jnp.asarray(row))[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_speculation_gives_the_tokens_of_plain_decoding(model, ids, heads):
    """Greedy, a ragged batch, with a stop inside accepted paths."""
    config = GenerateConfig(max_new_tokens=40)
    plain = generate_tokens(model, config, ids, stop_ids=[2])
    assert [len(row.tokens) for row in plain] == [row.steps for row in plain]
    assert plain[0].tokens[:12].tolist() == recomputed(model, ids[0], 12)
    for draft in ("lookup", "medusa"):
        rows = generate_tokens(model, dataclasses.replace(config, draft=draft), ids, heads=heads, stop_ids=[2])
        for row, expected in zip(rows, plain, strict=True):
            np.testing.assert_array_equal(row.tokens, expected.tokens)
        assert sum(row.steps for row in rows) < 0.95 * sum(row.steps for row in plain)
    # A token that plain decoding emits becomes a stop: it ends its row, wherever on a path it was accepted.
    stop = int(plain[1].tokens[-1])
    ended = generate_tokens(model, dataclasses.replace(config, draft="lookup"), ids, stop_ids=[stop])
    for row, expected in zip(ended, plain, strict=True):
        places = np.flatnonzero(expected.tokens == stop)
        np.testing.assert_array_equal(row.tokens, expected.tokens[: places[0] + 1 if len(places) else None])
        assert row.done


def test_bfloat16_gives_one_text_whatever_the_draft_and_the_batch(ids, heads, tree):
    model = linearized(lin_jax.load(STORIES, dtype="bfloat16")[0])
    config = GenerateConfig(max_new_tokens=40, prefill_chunk=8, tree=tree)
    plain = generate_tokens(model, config, ids)
    for draft in ("lookup", "medusa"):
        guessing = dataclasses.replace(config, draft=draft)
        for first in (0, len(ids) - 1):
            rows = generate_tokens(model, guessing, ids[first:], heads=heads)
            for row, expected in zip(rows, plain[first:], strict=True):
                np.testing.assert_array_equal(row.tokens, expected.tokens)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Programs that are traced for a device that would round float32."""
    monkeypatch.setattr(product, "target", lambda: TargetDevice("gpu", ""))
    jax.clear_caches()  # What was traced before knows another target.
    yield
    jax.clear_caches()


def test_no_product_of_decoding_is_left_to_what_a_device_rounds(on_a_gpu, model, ids, heads, tree):
    """In TF32, 3 of 80 texts of the checkpoint in float32 changed with the draft or the batch on an H100."""
    config = GenerateConfig(max_new_tokens=40, prefill_chunk=8, draft="medusa", tree=tree)
    generator = Generator(model, config, heads=heads)
    start = jax.make_jaxpr(lambda: generator.start(ids, [0] * len(ids)))
    advance = jax.make_jaxpr(generator.advance)
    for program in (str(start()), str(advance(generator.start(ids, [0] * len(ids))))):
        assert program.count("dot_general[") == program.count("precision=(Precision.HIGHEST") > 0


def test_samples_do_not_depend_on_draft_or_batch(augmented, ids, heads, tree):
    model = augmented
    sampling = SamplingConfig(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=5)
    config = GenerateConfig(max_new_tokens=24, sampling=sampling, prefill_chunk=8, tree=tree)
    plain = generate_tokens(model, config, ids)
    *_, [alone] = Generator(model, config).stream(ids[1:2], [0], numbers=[1], rows=3)
    np.testing.assert_array_equal(alone.tokens, plain[1].tokens)
    guessing = Generator(model, dataclasses.replace(config, draft="medusa"), heads=heads)
    *_, rows = guessing.stream(ids[::-1], [0] * len(ids), numbers=range(len(ids))[::-1])
    for row, expected in zip(rows[::-1], plain, strict=True):
        np.testing.assert_array_equal(row.tokens, expected.tokens)
    other = dataclasses.replace(config, sampling=dataclasses.replace(sampling, seed=6))
    assert any((a.tokens != b.tokens).any() for a, b in zip(generate_tokens(model, other, ids), plain, strict=True))


def test_prompts_and_samples_have_random_numbers_of_their_own(stories):
    """One prompt many times gives many texts; two prompts draw one token as often as independent draws would."""
    settings = {"temperature": 2.0, "max_new_tokens": 12, "batch_size": 5}
    texts = lin_jax.generate(*stories, PROMPTS[:1] * 12, samples=2, **settings)
    assert len(set(texts)) == 24
    model, (first, second) = stories[0], [np.array([1, 403, last], np.int32) for last in (407, 408)]
    sampling, count = SamplingConfig(temperature=3.0), 300
    generator = Generator(model, GenerateConfig(max_new_tokens=1, sampling=sampling))
    *_, rows = generator.stream([first] * count + [second] * count, [0] * 2 * count)
    drawn = np.array([row.tokens[0] for row in rows]).reshape(2, count)
    p_NV = [np.asarray(jax.nn.softmax(model(jnp.asarray(ids)[None])[0, -1] / 3)) for ids in (first, second)]
    expected = float(p_NV[0] @ p_NV[1])
    # Four standard deviations of a frequency.
    assert abs((drawn[0] == drawn[1]).mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("draft", ["none", "lookup"])
def test_what_is_counted_of_a_text_that_a_stop_string_ends_does_not_depend_on_blocks(stories, draft):
    [full] = lin_jax.generate(*stories, PROMPTS[:1], max_new_tokens=60)
    stop = "ved to pl"
    ids = stories[1].encode(PROMPTS[0])
    whole = stories[1].encode(full)
    texts = [stories[1].decode(whole[:count]) for count in range(len(whole) + 1)]
    needed = next(count for count, text in enumerate(texts) if stop in text) - len(ids)
    for block in (1, 5, 16, 64):
        settings = {"max_new_tokens": 60, "stop": (stop, "zzz"), "block": block, "draft": draft}
        [batch] = TextGenerator(*stories, make_config(settings)).batches(PROMPTS[:1])
        *_, [row] = batch
        assert row.prompt + row.text == full[: full.index(stop)] and row.tokens == needed


def test_typical_acceptance_keeps_more(stories, ids, heads, tree):
    sampling = SamplingConfig(temperature=0.7)
    config = GenerateConfig(max_new_tokens=40, draft="medusa", sampling=sampling, tree=tree)
    exact = generate_tokens(stories[0], config, ids, heads=heads)
    typical = dataclasses.replace(config, acceptance="typical", typical_threshold=0.01, typical_alpha=0.01)
    rows = generate_tokens(stories[0], typical, ids, heads=heads)
    assert all(len(row.tokens) == 40 for row in rows)
    assert sum(row.steps for row in rows) < sum(row.steps for row in exact)


def test_two_lines_of_python(stories):
    texts = lin_jax.generate(*stories, PROMPTS[:2], max_new_tokens=30, draft="lookup", batch_size=3, samples=2)
    assert [text[: len(prompt)] for text, prompt in zip(texts, np.repeat(PROMPTS[:2], 2), strict=True)] == [
        PROMPTS[0],
        PROMPTS[0],
        PROMPTS[1],
        PROMPTS[1],
    ]
    assert texts[0] == texts[1] and texts[0].startswith("Once upon a time, there was a little girl named Lily.")
    [short] = lin_jax.generate(*stories, PROMPTS[:1], max_new_tokens=30, stop=("girl", "boy"))
    assert short == "Once upon a time, there was a little "
    samples = lin_jax.generate(*stories, PROMPTS[:1], max_new_tokens=20, temperature=1.0, samples=3)
    assert len(set(samples)) == 3


def test_texts_are_streamed_in_blocks(stories):
    generator = TextGenerator(*stories, GenerateConfig(max_new_tokens=10, block=4))
    [batch] = [list(batch) for batch in generator.batches(PROMPTS[:1])]
    assert [rows[0].tokens for rows in batch] == [4, 8, 10]
    assert [rows[0].done for rows in batch] == [False, False, True]
    assert batch[-1][0].text.startswith(batch[0][0].text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": [""]}, "prompt 0 is empty"),
        ({"prompts": ["a"], "max_new_tokens": 600}, "positions=512"),
        ({"prompts": ["a"], "stop_tokens": ("<nothing>",)}, "no token '<nothing>'"),
        ({"prompts": ["a"], "draft": "medusa"}, "needs a model with Medusa heads"),
        ({"prompts": ["a"], "warmth": 1}, "unknown setting warmth"),
        ({"prompts": "a"}, "must be a list"),
        ({"prompts": ["a"], "temperature": -1.0}, "temperature must be 0 or more"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(stories, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        lin_jax.generate(*stories, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("heads", "tree", "message"),
    [
        ((4, 65, 512), "mc_sim_7b_63", "of another model"),
        ((3, 64, 512), "mc_sim_7b_63", "4 guesses deep"),
        ((4, 64, 512), "oak", "unknown tree"),
    ],
)
def test_heads_and_trees_that_do_not_fit_are_refused(stories, heads, tree, message):
    made = MedusaHeads(MedusaConfig(heads=heads[0]), *heads[1:], rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=message):
        Generator(stories[0], GenerateConfig(draft="medusa", tree=tree), heads=made)


def test_new_heads_say_what_the_model_says_and_are_read_back(stories, heads, tmp_path):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64)), jnp.float32)
    expected = np.repeat(np.asarray(stories[0].head(x))[:, None], 4, axis=1)
    np.testing.assert_allclose(heads(x), expected, atol=1e-5)
    write_heads(tmp_path, heads)
    np.testing.assert_array_equal(read_heads(tmp_path / "medusa_lm_head.safetensors")(x), heads(x))
    with pytest.raises(ConfigError, match="no Medusa heads"):
        read_heads(tmp_path / "nothing.pt")


def test_the_package_is_light_until_it_is_used():
    code = "import lin_jax, sys; assert 'jax' not in sys.modules; lin_jax.generate; assert 'jax' in sys.modules"
    assert run([sys.executable, "-c", code], check=False).returncode == 0
