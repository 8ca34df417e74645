"""The two ways in which tokens go through a model that has a state."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from lin_jax.ops.tree import Tree


@dataclasses.dataclass(frozen=True)
class Extend:
    """Tokens that are appended to the state: of each row the first `count_B`; what is behind them is padding."""

    count_B: Int[Array, " B"]

    def segment_ids(self, length: int) -> Int[Array, "B T"]:
        """1 for tokens and 0 for padding, of rows of this length."""
        return (jnp.arange(length)[None] < self.count_B[:, None]).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Verify:
    """Draft tokens, the nodes of a tree, which leave the state as it is."""

    tree: Tree


Step = Extend | Verify
