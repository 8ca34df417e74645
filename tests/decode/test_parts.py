"""Sampling, drafts and acceptance against plain Python."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.decode.accept import accept_exact, accept_typical
from lin_jax.decode.draft import from_heads, lookup
from lin_jax.decode.sampling import adjust, choose, seen_at_nodes, sequence_keys
from lin_jax.experiment import ConfigError, GenerateConfig, SamplingConfig
from lin_jax.ops.tree import chain, tree_from_paths
from tests.ops.decode_cases import random_tree

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))


def kept(**settings):
    logits = adjust(jnp.asarray(LOGITS)[None, None], SamplingConfig(temperature=1.0, **settings), None)
    return np.flatnonzero(np.isfinite(np.asarray(logits)[0, 0])).tolist()


def test_what_is_left_out():
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.65) == [0, 1] and kept(top_p=0.71) == [0, 1, 2] and kept(top_p=1e-6) == [0]
    assert kept(min_p=0.3) == [0, 1, 2]
    assert kept(top_k=4, top_p=0.99) == [0, 1, 2, 3]


def test_tokens_that_occurred_are_penalised():
    seen = jnp.asarray([True, False, False, False, False])[None, None]
    logits = jnp.asarray([2.0, -2.0, 1.0, 0.0, 0.0])[None, None]
    sampling = SamplingConfig(repetition_penalty=2.0)
    np.testing.assert_allclose(adjust(logits, sampling, seen)[0, 0], [1, -2, 1, 0, 0])
    np.testing.assert_allclose(adjust(logits, sampling, ~seen)[0, 0], [2, -4, 0.5, 0, 0])
    tree = tree_from_paths([[0], [1], [0, 0]])
    nodes = seen_at_nodes(seen[0], jnp.asarray([[1, 2, 3, 4]]), tree)
    expected = [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 0, 1]]
    np.testing.assert_array_equal(nodes[0].astype(int), expected)


def test_samples_have_the_distribution_and_depend_on_sequence_and_position_alone():
    B, sampling = 20_000, SamplingConfig(temperature=2.0, seed=3)
    logits = adjust(jnp.broadcast_to(jnp.asarray(LOGITS), (B, 2, 5)), sampling, None)
    key_B = sequence_keys(sampling.seed, jnp.arange(B) // 7, jnp.arange(B) % 7)
    token_BM = np.asarray(choose(logits, sampling, key_B, jnp.full(B, 7), chain(2)))
    p = np.exp(LOGITS / 2) / np.exp(LOGITS / 2).sum()
    for node in range(2):
        # Four standard deviations of a frequency.
        difference = np.bincount(token_BM[:, node], minlength=5) / B - p
        assert (np.abs(difference) < 4 * np.sqrt(p * (1 - p) / B)).all()
    joint = np.bincount(token_BM[:, 0] * 5 + token_BM[:, 1], minlength=25) / B
    assert np.abs(joint - np.outer(p, p).ravel()).max() < 0.01
    alone = choose(
        logits[:1, :1], sampling, sequence_keys(sampling.seed, jnp.array([1]), jnp.array([2])), jnp.array([8]), chain(1)
    )
    assert alone[0, 0] == token_BM[9, 1]


tree_shapes = st.tuples(st.integers(0, 2**16), st.integers(1, 20), st.integers(1, 6))


@hypothesis.settings(max_examples=20)
@hypothesis.given(shape=tree_shapes, seed=st.integers(0, 999))
def test_exact_acceptance_walks_down_the_tree(shape, seed):
    tree, rng = random_tree(*shape), np.random.default_rng(seed)
    # Few tokens, so that many are right. Siblings may have the same token: the deepest path is taken.
    token_M, choice_M = rng.integers(0, 2, tree.nodes), rng.integers(0, 2, tree.nodes)

    def deepest(node):
        right = [n for n in range(tree.nodes) if tree.parents[n] == node and token_M[n] == choice_M[node]]
        return 1 + max((deepest(n) for n in right), default=0)

    node = int(accept_exact(tree, jnp.asarray(token_M)[None], jnp.asarray(choice_M)[None])[0])
    path = tree.path_MQ[node][: tree.depth_M[node] + 1]
    assert len(path) == deepest(0)
    assert all(token_M[child] == choice_M[parent] for parent, child in zip(path, path[1:], strict=False))


def test_typical_acceptance_takes_the_likeliest_of_the_deepest_paths():
    tree = tree_from_paths([[0], [1], [2], [0, 0]])
    logits = np.tile(LOGITS, (1, 5, 1))
    limits = {"threshold": 0.2, "alpha": 10.0}
    # From the root tokens 1 (p 0.3) and 0 (0.4) are likely enough, and 3 (0.1) is not; below node 1 is token 4 (0.05).
    assert accept_typical(tree, jnp.asarray([[0, 1, 0, 3, 4]]), jnp.asarray(logits), **limits)[0] == 2
    # With token 1 below node 1 that path is the deepest.
    assert accept_typical(tree, jnp.asarray([[0, 1, 0, 3, 1]]), jnp.asarray(logits), **limits)[0] == 4
    # alpha exp(-entropy) is the lower limit: entropy is 1.39 nats, so 0.1 * 0.25 lets all tokens pass.
    limits = {"threshold": 0.2, "alpha": 0.1}
    assert accept_typical(tree, jnp.asarray([[0, 3, 0, 2, 4]]), jnp.asarray(logits), **limits)[0] == 4


@hypothesis.settings(max_examples=40)
@hypothesis.given(text=st.lists(st.integers(1, 3), max_size=12), last=st.integers(1, 3))
def test_lookup_finds_the_latest_place_where_most_tokens_agree(text, last):
    match, count, X = 3, 4, 14
    whole = [*text, last]

    def agreeing(place):
        for back in range(match):
            if place - back < 0 or whole[place - back] != whole[-1 - back]:
                return back
        return match

    best = max(((agreeing(place), place) for place in range(len(text) - 1)), default=(0, 0))
    expected = whole[best[1] + 1 :][:count] if best[0] else []
    # The last token itself may not be guessed from, as it stands in no text yet.
    expected = [*expected[: max(len(text) - best[1] - 1, 0)]]
    padded = jnp.asarray([text + [9] * (X - len(text))])
    found = lookup(padded, jnp.asarray([len(text)]), jnp.asarray([last]), tokens=count, match=match)
    assert found[0].tolist() == expected + [0] * (count - len(expected))


def test_nodes_take_the_guesses_of_their_heads():
    logits = jnp.asarray([[[0.0, 3, 2, 1], [5, 4, 9, 0]]])
    tree = tree_from_paths([[0], [2], [0, 1], [2, 0]])
    assert from_heads(logits, jnp.asarray([7]), tree)[0].tolist() == [7, 1, 3, 0, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingConfig(temperature=-0.1), "temperature must be 0 or more"),
        (lambda: SamplingConfig(top_p=0.0), "top_p must lie above 0"),
        (lambda: SamplingConfig(min_p=1.5), "min_p must lie between"),
        (lambda: SamplingConfig(repetition_penalty=0.0), "repetition_penalty must be greater"),
        (lambda: GenerateConfig(max_new_tokens=0), "max_new_tokens must be greater"),
        (lambda: GenerateConfig(acceptance="typical"), "give a temperature"),
        (lambda: GenerateConfig(stop=("",)), "empty string"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_keys_do_not_repeat():
    number_B, sample_B = jnp.repeat(jnp.arange(50), 50), jnp.tile(jnp.arange(50), 50)
    data = jax.random.key_data(sequence_keys(1, number_B, sample_B))
    assert len(np.unique(np.asarray(data), axis=0)) == 2500
