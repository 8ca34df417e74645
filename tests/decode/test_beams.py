"""Beam search: against every text that there is, and against the search written down plainly."""

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from lin_jax.decode.beams import BeamSearch
from lin_jax.decode.generate import generate_tokens
from lin_jax.experiment import ConfigError, GenerateConfig, SamplingConfig
from tests.models import test_base, test_t5

pytestmark = pytest.mark.usefixtures("quick_compilation")

END = 1


@pytest.fixture(scope="module", params=["augmented", "softmax", "gpt2"])
def model(request):
    if request.param == "gpt2":
        return test_base.make_model(test_base.make_config("gpt2", {}))
    return test_t5.make_model(test_t5.make_config(request.param, vocabulary_size=6))


def log_probabilities(model, prompt):
    """The function that gives, for a text as a tuple, those of the next token, each computed from whole rows."""
    source = {"memory": model.encode(jnp.asarray(prompt)[None])} if model.reads_source else {}
    before = [model.config.start_token] if model.reads_source else list(prompt)
    run = jax.jit(lambda rows: jax.nn.log_softmax(model.head(model.features(rows, **source))[0]))
    known = {}

    def of(text):
        if text not in known:
            # All rows are of one length, for one program: what comes later changes nothing.
            row = np.zeros((1, len(before) + 5), np.int32)
            row[0, : len(before) + len(text)] = [*before, *text]
            known[text] = np.asarray(run(jnp.asarray(row)), np.float64)[len(before) + len(text) - 1]
        return known[text]

    return of


def search(of, beams, most, penalty):
    """The search as `lin_jax.decode.beams` describes it, a text at a time."""
    running, ended = [(0.0, ())], []
    for length in range(1, most + 1):
        candidates = sorted(
            ((score + value, (*text, token)) for score, text in running for token, value in enumerate(of(text))),
            reverse=True,
        )[: 2 * beams]
        ends = [text[-1] == END or length == most for _, text in candidates]
        for (score, text), end in list(zip(candidates, ends, strict=True))[:beams]:
            if end:
                ended.append((score / length**penalty, text))
        ended = sorted(ended, reverse=True)[:beams]
        running = [candidate for candidate, end in zip(candidates, ends, strict=True) if not end][:beams]
        if not running or (len(ended) == beams and running[0][0] / length**penalty <= ended[-1][0]):
            break
    return ended[0][1]


def found_by(model, prompts, **changes):
    *_, rows = BeamSearch(model, GenerateConfig(**changes), stop_ids=[END]).stream(prompts, [0] * len(prompts))
    return [tuple(int(token) for token in row.tokens) for row in rows]


@settings(max_examples=6, deadline=None)
@given(
    beams=st.sampled_from([2, 4]),
    most=st.sampled_from([1, 3, 5]),
    penalty=st.sampled_from([0.0, 0.6, 1.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_the_search_is_the_one_written_down(model, beams, most, penalty, seed):
    V, rng = model.config.vocabulary_size, np.random.default_rng(seed)
    prompts = [rng.integers(2, V, size).astype(np.int32) for size in (3, 7)]
    found = found_by(model, prompts, beams=beams, max_new_tokens=most, length_penalty=penalty, block=2)
    assert found == [search(log_probabilities(model, prompt), beams, most, penalty) for prompt in prompts]


def test_with_beams_for_all_texts_it_finds_the_likeliest():
    model = test_t5.make_model(test_t5.make_config("augmented", vocabulary_size=4))
    prompt = np.array([2, 3, 2], np.int32)
    of, scores = log_probabilities(model, prompt), {}
    for length in (1, 2, 3):
        for text in itertools.product(range(4), repeat=length):
            if END not in text[:-1] and (text[-1] == END or length == 3):
                scores[text] = sum(of(text[:at])[token] for at, token in enumerate(text)) / length
    assert found_by(model, [prompt], beams=64, max_new_tokens=3) == [max(scores, key=scores.get)]


def test_one_beam_is_greedy(model):
    prompt = np.array([2, 3, 4], np.int32)
    [greedy] = generate_tokens(model, GenerateConfig(max_new_tokens=5), [prompt], stop_ids=[END])
    wanted = tuple(int(token) for token in greedy.tokens)
    assert search(log_probabilities(model, prompt), 1, 5, 1.0) == wanted


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"beams": 0}, "beams must be greater than 0"),
        ({"beams": 4, "samples": 2}, "beams=4 gives the best text alone"),
        ({"beams": 2, "draft": "lookup"}, "beams=2 gives the best text alone"),
        ({"beams": 2, "sampling": SamplingConfig(temperature=1.0)}, "beams=2 gives the best text alone"),
    ],
)
def test_settings_that_beams_do_not_have_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        GenerateConfig(**changes)
