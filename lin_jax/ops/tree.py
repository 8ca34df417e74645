"""A tree of draft tokens: which nodes it has, and where each stands. All of it is known before anything is compiled."""

import dataclasses
from collections.abc import Iterable
from functools import cached_property

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tree:
    """M draft tokens, each a guess of what follows its parent. Node 0 is the root, which follows the verified tokens.

    Hashable, and so a static argument of a compiled program.

    Attributes:
        parents: the parent of each node, an earlier one; -1 for the root.
        ranks: which of the guesses at its depth a node takes, 0 the likeliest; siblings have different ones.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self):
        if len(self.parents) != len(self.ranks) or not self.parents or self.parents[0] != -1:
            raise ValueError("a tree has a parent and a rank for every node, and its first node is the root, parent -1")
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node:
                raise ValueError(f"node {node} of a tree must come after its parent, but its parent is {parent}")
        if len(set(zip(self.parents, self.ranks, strict=True))) < len(self.parents):
            raise ValueError("two nodes of a tree have the same parent and the same rank")

    @property
    def nodes(self) -> int:
        """Number of nodes M, the root included."""
        return len(self.parents)

    @property
    def height(self) -> int:
        """Nodes on the longest path from the root, the root included."""
        return int(self.depth_M.max()) + 1

    @property
    def widest_rank(self) -> int:
        """Guesses that are needed at a depth."""
        return max(self.ranks) + 1

    @property
    def is_chain(self) -> bool:
        """Whether every node's parent is the one before it."""
        return self.parents == tuple(range(-1, self.nodes - 1))

    @cached_property
    def depth_M(self) -> np.ndarray:
        """Depth of each node, 0 for the root."""
        depth = np.zeros(self.nodes, np.int32)
        for node in range(1, self.nodes):
            depth[node] = depth[self.parents[node]] + 1
        return depth

    @cached_property
    def ancestor_MM(self) -> np.ndarray:
        """Row m, column n: whether node n is m or an ancestor of it."""
        ancestor = np.eye(self.nodes, dtype=bool)
        for node in range(1, self.nodes):
            ancestor[node] |= ancestor[self.parents[node]]
        return ancestor

    @cached_property
    def path_MQ(self) -> np.ndarray:
        """Row m: the nodes from the root to m, one a depth; deeper entries repeat m."""
        path = np.repeat(np.arange(self.nodes, dtype=np.int32)[:, None], self.height, axis=1)
        for node in range(self.nodes):
            ancestors = np.flatnonzero(self.ancestor_MM[node])
            path[node, : len(ancestors)] = ancestors
        return path

    @cached_property
    def leaves(self) -> np.ndarray:
        """The nodes without children."""
        return np.setdiff1d(np.arange(self.nodes), self.parents)


def chain(length: int) -> Tree:
    """A tree that is one path of `length` nodes."""
    return Tree(tuple(range(-1, length - 1)), (0,) * length)


def tree_from_paths(paths: Iterable[Iterable[int]]) -> Tree:
    """The tree of Medusa's choices (Cai et al., 2024): a path is the rank of each of its nodes, below the root.

    Nodes are in the order of Medusa's code: by depth, and then by path.

    Raises:
        ValueError: a path is given twice, is empty, or another lacks the node that it hangs on.
    """
    ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
    number: dict[tuple[int, ...], int] = {(): 0}
    parents, ranks = [-1], [0]
    for path in ordered:
        if path in number:
            raise ValueError(f"the path {list(path)} of a tree is empty or given twice")
        if path[:-1] not in number:
            raise ValueError(f"the path {list(path)} of a tree needs the path {list(path[:-1])}")
        if path[-1] < 0:
            raise ValueError(f"the path {list(path)} of a tree has a negative rank")
        number[path] = len(parents)
        parents.append(number[path[:-1]])
        ranks.append(path[-1])
    return Tree(tuple(parents), tuple(ranks))


# Medusa's published trees of 63 nodes and the root; a digit is the rank of a node on a path.
_PUBLISHED = {
    "mc_sim_7b_63": (
        "0 1 2 3 4 5 6 7 8 9 00 01 02 03 04 05 06 07 08 09 10 11 12 13 14 15 16 20 21 22 30 31 40 50 60 70 80 "
        "90 000 001 002 003 004 005 006 007 008 009 010 011 012 020 021 030 040 050 060 070 100 101 200 0000 "
        "0001"
    ),
    "vicuna_7b_stage2": (
        "0 1 2 3 4 5 6 7 8 9 00 01 02 03 04 05 06 07 08 09 10 11 12 13 14 20 21 30 31 40 50 60 70 000 001 002 "
        "003 004 005 006 007 008 010 011 012 013 020 021 030 040 050 100 101 102 110 200 0000 0001 0002 0003 "
        "0010 0020 0100"
    ),
}
TREES = {name: tree_from_paths(map(int, path) for path in paths.split()) for name, paths in _PUBLISHED.items()}
