"""The tree of a node budget against all trees there are, and trees in files."""

import itertools
import json
import math
import os

import numpy as np
import pytest

from lin_jax.decode.trees import best_paths, expected_tokens, find_tree, tree_to_json
from lin_jax.experiment import ConfigError
from lin_jax.ops.tree import TREES


def all_trees(depth, ranks, guesses):
    """Every set of so many paths that holds each path's beginning."""
    paths = [path for length in range(1, depth + 1) for path in itertools.product(range(ranks), repeat=length)]
    for chosen in itertools.combinations(paths, guesses):
        if all(path[:-1] in chosen or len(path) == 1 for path in chosen):
            yield chosen


def kept(accuracy, paths):
    """Tokens a step, by going through what every head's right rank may be; rank `ranks` is none of its guesses."""
    heads, ranks = np.shape(accuracy)
    likely = [[*row, 1 - sum(row)] for row in accuracy]
    total = 0.0
    for right in itertools.product(range(ranks + 1), repeat=heads):
        length = sum(right[:depth] in paths for depth in range(1, heads + 1))
        total += math.prod(likely[head][rank] for head, rank in enumerate(right)) * (1 + length)
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("guesses", [1, 3, 5])
def test_no_tree_of_as_many_nodes_keeps_more(seed, guesses):
    accuracy = np.random.default_rng(seed).dirichlet([1.0] * 3, size=3)[:, :2]
    paths = best_paths(accuracy.tolist(), guesses + 1)
    best = max(kept(accuracy, tree) for tree in all_trees(3, 2, guesses))
    assert len(paths) == guesses
    np.testing.assert_allclose(kept(accuracy, paths), best, rtol=1e-12)
    np.testing.assert_allclose(expected_tokens(accuracy.tolist(), paths), best, rtol=1e-12)


def test_guesses_that_are_never_right_are_left_out():
    assert best_paths([[0.5, 0.0], [0.0, 0.0]], 10) == [(0,)]


def test_a_tree_is_read_back(tmp_path):
    accuracy = [[0.6, 0.2], [0.4, 0.1]]
    paths = best_paths(accuracy, 5)
    (tmp_path / "tree.json").write_text(tree_to_json(paths, accuracy))
    tree = find_tree(str(tmp_path / "tree.json"))
    assert tree.nodes == 5 and [tuple(path) for path in paths] == [(0,), (0, 0), (1,), (1, 0)]
    (tmp_path / "bare.json").write_text(json.dumps([list(path) for path in paths]))
    assert find_tree(str(tmp_path / "bare.json")) == tree
    assert find_tree("mc_sim_7b_63") is TREES["mc_sim_7b_63"]


NOT_PATHS = ["{}", "[1]", '[["a"]]', "[[1.5]]", "[[true]]", "[[null]]", "[{}]", "null", "3", '"a"', '{"paths": 1}']
NOT_PATHS += ["[[0", "[[1e999]]", "[[NaN]]", "[[" + "1" * 400 + "]]", "[" * 1000 + "]" * 1000, '{"paths": {"a": [0]}}']
NOT_PATHS += ['[["\\ud800"]]', '[["\\u0000"]]', "[[0], [1, 0]]", "[[0], [0]]", "[[]]", "[[-1]]", '{"paths": null}']


@pytest.mark.parametrize("text", NOT_PATHS)
def test_a_file_without_a_tree_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "tree.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="tree.json") as error:
        find_tree(str(file))
    assert "\n" not in str(error.value)


def test_what_is_no_file_of_a_reasonable_size_is_refused(tmp_path):
    (tmp_path / "wide.json").write_text(json.dumps([[rank] for rank in range(20_000)]))
    os.mkfifo(tmp_path / "pipe.json")
    cases = {"absent": "does not exist", "pipe": "is not a file", "wide": "at most 4096 nodes"}
    for name, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            find_tree(str(tmp_path / f"{name}.json"))
