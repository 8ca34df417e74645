"""Generation from sources: batches, guesses by look-up in the source, texts without their sources."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.data.tokenizers import BytesTokenizer
from lin_jax.decode.generate import Generator, generate_tokens
from lin_jax.decode.text import TextGenerator, generate, make_config
from lin_jax.experiment import ConfigError, GenerateConfig, SamplingConfig
from tests.models.test_t5 import make_config as make_t5
from tests.models.test_t5 import make_model

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=["softmax", "augmented"])
def model(request):
    return make_model(make_t5(request.param, vocabulary_size=257, start_token=9))


def sources(*sizes):
    return [np.random.default_rng(size).integers(0, 256, size).astype(np.int32) for size in sizes]


def by_whole_rows(model, source, count):
    """The likeliest token, one at a time, each from all tokens before it."""
    row = [model.config.start_token]
    memory = model.encode(jnp.asarray(source)[None])
    for _ in range(count):
        row.append(int(jnp.argmax(model.head(model.features(jnp.asarray([row]), memory=memory))[0, -1])))
    return row[1:]


def test_targets_are_those_of_whole_rows(model):
    """In a batch of sources of different lengths, with rows that hold nothing."""
    prompts = sources(5, 140, 1)
    found = generate_tokens(model, GenerateConfig(max_new_tokens=4), prompts)
    for row, prompt in zip(found, prompts, strict=True):
        assert row.tokens.tolist() == by_whole_rows(model, prompt, 4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_from_the_source_change_no_token(model, temperature):
    prompts, sampling = sources(12, 40), SamplingConfig(temperature=temperature, seed=3)
    config = GenerateConfig(max_new_tokens=12, sampling=sampling)
    plain = generate_tokens(model, config, prompts)
    guessed = generate_tokens(model, dataclasses.replace(config, draft="lookup"), prompts)
    for row, other in zip(plain, guessed, strict=True):
        assert row.tokens.tolist() == other.tokens.tolist()


def test_what_the_source_says_is_guessed():
    """A target that repeats its source takes far fewer steps than tokens."""
    model, rng = make_model(make_t5("augmented", vocabulary_size=257, scale_head=False)), np.random.default_rng(5)
    state = nnx.state(model, nnx.Param)
    # So far from its start that its targets are no repetitions of one token.
    nnx.update(model, jax.tree.map(lambda leaf: leaf + rng.standard_normal(leaf.shape, np.float32), state))
    [target] = generate_tokens(model, GenerateConfig(max_new_tokens=24), sources(30))
    generator = Generator(model, GenerateConfig(max_new_tokens=24, draft="lookup"))
    progress = generator.start(sources(30), [0])
    assert progress.source_BS.shape == (1, 128)
    assert progress.source_BS[0, -30:].tolist() == sources(30)[0].tolist()
    assert (np.asarray(progress.source_BS[0, :-30]) == -1).all()
    assert len(set(target.tokens.tolist())) > 8
    # What is searched, and not what was read, now ends with the target.
    told = np.asarray(progress.source_BS).copy()
    told[0, -24:] = target.tokens
    progress = dataclasses.replace(progress, source_BS=jnp.asarray(told))
    for _ in range(2):
        progress = generator.advance(progress)
    assert bool(progress.done_B[0])
    assert int(progress.steps_B[0]) <= 12
    length = int(progress.state.length_B[0])
    assert np.asarray(progress.text_BX)[0, 1:length].tolist() == target.tokens.tolist()


def test_texts_are_targets_alone(model):
    tokenizer = BytesTokenizer()
    config = make_config({"max_new_tokens": 6})
    [[*_, rows]] = TextGenerator(model, tokenizer, config).batches(["some source"])
    source = np.append(tokenizer.encode("some source"), 256)
    wanted = by_whole_rows(model, source, 6)
    assert rows[0].text == tokenizer.decode(wanted)
    assert generate(model, tokenizer, ["some source"], max_new_tokens=6) == [tokenizer.decode(wanted)]


def test_beams_give_texts_too(model):
    assert len(generate(model, BytesTokenizer(), ["a source", "b"], max_new_tokens=5, beams=3)) == 2


def test_errors(model):
    with pytest.raises(ConfigError, match="prompt 0 is empty"):
        generate(model, BytesTokenizer(), [""])
    with pytest.raises(ConfigError, match="beams must be greater than 0"):
        generate(model, BytesTokenizer(), ["a"], beams=0)
    with pytest.raises(ConfigError, match="length_penalty is for beams=2 and more"):
        generate(model, BytesTokenizer(), ["a"], length_penalty=2.0)
