"""Trees against plain walks over their parents, and Medusa's published ones."""

import hypothesis
import numpy as np
import pytest

from lin_jax.ops.tree import TREES, Tree, chain, tree_from_paths
from tests.ops.decode_cases import random_tree, tree_shapes


def walk(tree: Tree, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.insert(0, node)
        node = tree.parents[node]
    return path


@hypothesis.settings(max_examples=50)
@hypothesis.given(shape=tree_shapes)
def test_every_node_knows_its_path(shape):
    tree = random_tree(*shape)
    assert tree.height == max(len(walk(tree, node)) for node in range(tree.nodes))
    for node in range(tree.nodes):
        path = walk(tree, node)
        assert tree.depth_M[node] == len(path) - 1
        assert np.flatnonzero(tree.ancestor_MM[node]).tolist() == sorted(path)
        assert tree.path_MQ[node].tolist() == path + [node] * (tree.height - len(path))
    assert tree.leaves.tolist() == [node for node in range(tree.nodes) if node not in tree.parents]


def test_a_chain_and_a_single_node():
    assert chain(4).parents == (-1, 0, 1, 2) and chain(4).is_chain and chain(4).height == 4
    assert chain(1) == Tree((-1,), (0,)) == tree_from_paths([])
    assert tree_from_paths([[0], [0, 0], [0, 0, 0]]) == chain(4)
    assert not tree_from_paths([[0], [1]]).is_chain


def test_published_trees_have_64_nodes_and_depth_4():
    assert {name: (tree.nodes, tree.height) for name, tree in TREES.items()} == {
        "mc_sim_7b_63": (64, 5),
        "vicuna_7b_stage2": (64, 5),
    }
    # Counted in the official code: 1, 10, 28, 23, 2 nodes a depth, and 42 leaves.
    assert np.bincount(TREES["mc_sim_7b_63"].depth_M).tolist() == [1, 10, 28, 23, 2]
    assert len(TREES["mc_sim_7b_63"].leaves) == 42


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[0], [1, 0]], "needs the path"),
        ([[0], [0]], "given twice"),
        ([[]], "empty"),
        ([[-1]], "negative"),
    ],
)
def test_impossible_paths_are_refused(paths, message):
    with pytest.raises(ValueError, match=message):
        tree_from_paths(paths)


@pytest.mark.parametrize(
    ("parents", "ranks"), [((), ()), ((0,), (0,)), ((-1, 1), (0, 0)), ((-1, 0), (0,)), ((-1, 0, 0), (0, 1, 1))]
)
def test_impossible_trees_are_refused(parents, ranks):
    with pytest.raises(ValueError, match="tree"):
        Tree(parents, ranks)
