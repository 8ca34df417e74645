"""Direct integration of a tree: every candidate is a sequence of its own, with its own state (the paper's Table 9).

What sharing the state saves is measured against this. The tokens are the same.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.models.base import Decoder, DecoderState, unstacked
from lin_jax.ops.tree import Tree, chain


class DirectIntegration(Decoder):
    """A model that reads each of the L paths from a tree's root to its leaves in a row of its own.

    To its caller it has B rows, and all verbs of a language model; the layers' states have B * L.
    """

    def __init__(self, model: Decoder, tree: Tree):
        """Verify `tree`, and no other, with `model`."""
        self.model, self.tree = unstacked(model), tree
        self.config = model.config

    @property
    def layers(self) -> Any:
        """The model's."""
        return self.model.layers

    @property
    def candidates(self) -> int:
        """Paths L."""
        return len(self.tree.leaves)

    def check_decodable(self, capacity: int) -> None:
        """As the model."""
        self.model.check_decodable(capacity)

    def begin(self, tokens_BT: Array, segment_ids_BT: Array | None, partition: Partition = WHOLE) -> tuple[Any, ...]:
        """As the model."""
        return self.model.begin(tokens_BT, segment_ids_BT, partition)

    def embed(self, tokens_BT: Array, position_BT: Array) -> tuple[Array, tuple[Any, ...]]:
        """As the model."""
        return self.model.embed(tokens_BT, position_BT)

    def head(self, x_BTC: Array) -> Array:
        """As the model."""
        return self.model.head(x_BTC)

    def empty_state(self, batch: int, capacity: int) -> DecoderState:
        """A state for every candidate of every row."""
        state = self.model.empty_state(batch * self.candidates, capacity)
        return DecoderState(state.layers, jnp.zeros(batch, jnp.int32))

    def forward(
        self, tokens_BT: Array, state: DecoderState, real_BT: Array | None = None
    ) -> tuple[Array, DecoderState]:
        """Every candidate reads the row's tokens."""
        real = None if real_BT is None else self._spread(real_BT)
        x_BTC, after = self.model.forward(self._spread(tokens_BT), self._inner(state), real)
        return x_BTC[:: self.candidates], DecoderState(after.layers, after.length_B[:: self.candidates])

    def verify(self, tokens_BM: Array, tree: Tree, state: DecoderState) -> tuple[Array, tuple[Any, ...]]:
        """Every candidate reads its path; features and what `commit` needs are then gathered by node."""
        paths_LP = self.tree.path_MQ[self.tree.leaves]
        tokens = tokens_BM[:, paths_LP].reshape(-1, self.tree.height)
        x, pending = self.model.verify(tokens, chain(self.tree.height), self._inner(state))
        leaf_M = np.argmax(self.tree.ancestor_MM[self.tree.leaves], axis=0)

        def by_node(x: Array) -> Array:
            return x.reshape(-1, self.candidates, *x.shape[1:])[:, leaf_M, self.tree.depth_M]

        return by_node(x), jax.tree.map(by_node, pending)

    def commit(self, state: DecoderState, pending: tuple[Any, ...], path_BP: Array, count_B: Array) -> DecoderState:
        """The accepted path goes into the states of all candidates."""
        spread = jax.tree.map(self._spread, pending)
        after = self.model.commit(self._inner(state), spread, self._spread(path_BP), self._spread(count_B))
        return DecoderState(after.layers, state.length_B + count_B)

    def _spread(self, x_B: Array) -> Array:
        return jnp.repeat(x_B, self.candidates, axis=0)

    def _inner(self, state: DecoderState) -> DecoderState:
        return DecoderState(state.layers, self._spread(state.length_B))
