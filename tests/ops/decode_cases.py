"""Random trees, and attention cases cut into prompts and draft nodes."""

import dataclasses
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.ops.tree import Tree

# Arguments of `random_tree`: a seed, nodes, and the greatest depth, the root not counted. The tree is made in the test,
# because hypothesis dislikes the run-time type checker's random numbers in a strategy.
tree_shapes = st.tuples(st.integers(0, 2**16), st.integers(1, 64), st.integers(1, 8))


def random_tree(seed: int, nodes: int, depth: int) -> Tree:
    rng = np.random.default_rng(seed)
    parents, ranks, depths, children = [-1], [0], [0], [0]
    for _ in range(nodes - 1):
        # Late nodes are likelier parents, so that trees get deep.
        possible = [node for node in range(len(parents)) if depths[node] < depth]
        parent = possible[int(len(possible) * rng.random() ** 0.5)]
        parents.append(parent)
        ranks.append(children[parent])
        depths.append(depths[parent] + 1)
        children[parent] += 1
        children.append(0)
    return Tree(tuple(parents), tuple(ranks))


@dataclasses.dataclass(frozen=True)
class Draft:
    """Tokens of rows, draft nodes behind them, and the sequences that each leaf stands for."""

    row: dict[str, Any]
    nodes: dict[str, Any]
    tree: Tree

    def sequences(self, length_B: np.ndarray) -> tuple[dict[str, Any], jax.Array]:
        """Each row's first `length_B` tokens with each leaf's path: arrays [B * leaves, T, ...], and segment ids."""
        B, T = next(iter(self.row.values())).shape[:2]
        total = T + self.tree.height
        leaves = self.tree.leaves
        index, ids = np.zeros((B, len(leaves), total), np.int64), np.zeros((B, len(leaves), total), np.int32)
        for b, length in enumerate(length_B):
            index[b, :, :length] = np.arange(length)
            for i, leaf in enumerate(leaves):
                path = self.tree.path_MQ[leaf][: self.tree.depth_M[leaf] + 1]
                index[b, i, length : length + len(path)] = T + path
                ids[b, i, : length + len(path)] = 1
        index = index.reshape(-1, total)
        rows = np.repeat(np.arange(B), len(leaves))[:, None]
        joined = {name: jnp.concatenate([x, self.nodes[name]], axis=1)[rows, index] for name, x in self.row.items()}
        return joined, jnp.asarray(ids.reshape(-1, total))

    def at_nodes(self, y: np.ndarray, length_B: np.ndarray) -> np.ndarray:
        """Of outputs [B * leaves, T, ...] those of the nodes, [B, M, ...]."""
        tree, leaves = self.tree, self.tree.leaves
        leaf_of = np.array([np.flatnonzero(tree.ancestor_MM[leaves, node])[0] for node in range(tree.nodes)])
        y = np.asarray(y).reshape(len(length_B), len(leaves), *y.shape[1:])
        return y[np.arange(len(length_B))[:, None], leaf_of[None], length_B[:, None] + tree.depth_M[None]]


def make_draft(
    seed: int, tree: Tree, T: int, *, B: int, sizes: dict[str, tuple[int, int]], dtype: Any = jnp.float32
) -> Draft:
    """Normal arrays of T tokens and of the nodes; `sizes` gives the heads and the size of each array."""
    rng = np.random.default_rng(seed)
    normal = lambda length, shape: jnp.asarray(rng.standard_normal((B, length, *shape)), dtype)  # noqa: E731
    row = {name: normal(T, shape) for name, shape in sizes.items()}
    return Draft(row, {name: normal(tree.nodes, shape) for name, shape in sizes.items()}, tree)
