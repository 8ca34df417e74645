"""Which tree of guesses to verify: a published one, one in a file, or the best for measured heads."""

import heapq
import json
import math
from collections.abc import Iterable, Sequence

from lin_jax.ops.tree import TREES, Tree, tree_from_paths
from lin_jax.settings.base import ConfigError, require
from lin_jax.settings.foreign import read_json
from lin_jax.settings.typed import fit

# A path is the rank of the guess at each depth, below the root.
TreePath = tuple[int, ...]
# Every node is compared with every other one; published trees have 64. So many, on paths of some depth, take this much.
MOST_NODES, _MAX_BYTES = 4096, 1 << 20


def find_tree(name: str) -> Tree:
    """Return the tree of a setting: a published one, or that of a .json file.

    The file holds a list of paths such as [[0], [1], [0, 0]], alone or under "paths".

    Raises:
        ConfigError: there is none, or the paths make no tree.
    """
    if name in TREES:
        return TREES[name]
    require(
        name.endswith(".json"), f"unknown tree {name!r}; there are {', '.join(TREES)}, or a .json file with its paths"
    )
    values = read_json(name, limit=_MAX_BYTES)
    nested = values.get("paths") if isinstance(values, dict) else values
    paths = fit(nested, list[list[int]], f"{name}: the list of paths, such as [[0], [1], [0, 0]],")
    require(
        len(paths) < MOST_NODES,
        f"{name}: a tree has at most {MOST_NODES} nodes, and its root is one of them",
    )
    try:
        return tree_from_paths(paths)
    except ValueError as error:
        raise ConfigError(f"{name} holds no paths of a tree: {error}") from error


def tree_to_json(paths: Iterable[TreePath], accuracy: Sequence[Sequence[float]]) -> str:
    """Return the text of a file for `find_tree`: a tree, with the accuracies it was chosen from."""
    return json.dumps({"paths": [list(path) for path in paths], "accuracy": [list(row) for row in accuracy]}) + "\n"


def best_paths(accuracy: Sequence[Sequence[float]], nodes: int) -> list[TreePath]:
    """The tree that keeps most tokens a step, if heads are right independently of each other (Cai et al., 2024).

    A node is accepted with the product of the accuracies on its path, which is no more than its parent's; so the
    likeliest nodes make a tree.

    Args:
        accuracy: row k, column r: how often the guess of rank r of head k is right.
        nodes: at most so many, the root included.

    Returns:
        The paths, likeliest first; guesses that are never right are left out.
    """
    chosen: list[TreePath] = []
    candidates: list[tuple[float, TreePath]] = [(-1.0, ())]
    while candidates and len(chosen) < nodes:
        value, path = heapq.heappop(candidates)
        chosen.append(path)
        ranks = accuracy[len(path)] if len(path) < len(accuracy) else ()
        for rank, right in enumerate(ranks):
            if right > 0:
                heapq.heappush(candidates, (value * right, (*path, rank)))
    return chosen[1:]


def expected_tokens(accuracy: Sequence[Sequence[float]], paths: Iterable[TreePath]) -> float:
    """Tokens a step, the root's included, under the same assumption."""
    return 1 + sum(math.prod(accuracy[depth][rank] for depth, rank in enumerate(path)) for path in paths)
