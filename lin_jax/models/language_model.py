"""What all language models share when they decode: a state, and four verbs that change it or look ahead from it."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attentions.mixing import layer_kinds
from lin_jax.layers.stack import each_layer, unstack_layers
from lin_jax.layers.steps import Extend, Step, Verify
from lin_jax.models.gpt2_settings import Gpt2Config
from lin_jax.models.llama_settings import LlamaConfig
from lin_jax.ops.tree import Tree
from lin_jax.settings.base import require


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelState:
    """What a model knows of the `length_B` tokens that it has read in each row: the state of every layer."""

    layers: tuple[Any, ...]
    length_B: Int[Array, " B"]


class LanguageModel(nnx.Module):
    """A model with `config`, stacked or single `layers`, `norm`, and `embed`, which decodes with the layers' states.

    `medusa` holds Medusa heads where `lin_jax.load` found some. Layers are run one after another: their states then
    stay where they are, and are not copied in and out of a stack.
    """

    config: Any
    layers: Any
    norm: Any
    medusa: Any = None

    @abc.abstractmethod
    def embed(self, tokens_BT: Int[Array, "B T"], position_BT: Int[Array, "B T"]) -> tuple[Array, tuple[Any, ...]]:
        """Input of the first layer, and what all layers are told of positions."""

    @abc.abstractmethod
    def check_decodable(self, capacity: int) -> None:
        """Raise `ConfigError` unless sequences of `capacity` tokens can be decoded exactly."""

    def empty_state(self, batch: int, capacity: int) -> ModelState:
        """The state of `batch` rows before their first token.

        Args:
            batch: rows B.
            capacity: tokens of the longest sequence; only softmax attention, with its cache, takes memory for them.

        Raises:
            ConfigError: the model cannot decode, or not so many tokens.
        """
        self.check_decodable(capacity)
        kinds = layer_kinds(self.config.attention, self.config.depth)
        states = tuple(self._without_parameters().empty_state(batch, capacity, kind) for kind in kinds)
        return ModelState(states, jnp.zeros(batch, jnp.int32))

    def _without_parameters(self) -> Any:
        """A layer, for what does not depend on its parameters; the whole stack serves as one."""
        return self.layers[0] if isinstance(self.layers, nnx.List) else self.layers

    def forward(
        self, tokens_BT: Int[Array, "B T"], state: ModelState, real_BT: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T C"], ModelState]:
        """Read tokens that follow the state; a long text in several calls, each with a part of it.

        Args:
            tokens_BT: token ids.
            state: of the tokens before.
            real_BT: False for padding, which may stand anywhere in a row and changes nothing; None: there is none.

        Returns:
            The features of the tokens, which `head` reads (of padding: any numbers), and the state after them.
        """
        B, T = tokens_BT.shape
        if real_BT is None:
            return self._extend(tokens_BT, state, jnp.full(B, T, jnp.int32))
        count_B = jnp.sum(real_BT, axis=1, dtype=jnp.int32)
        order_BT = jnp.argsort(~real_BT, axis=1, stable=True)
        x_BTC, state = self._extend(jnp.take_along_axis(tokens_BT, order_BT, axis=1), state, count_B)
        back_BT = jnp.maximum(jnp.cumsum(real_BT, axis=1) - 1, 0)
        return jnp.take_along_axis(x_BTC, back_BT[:, :, None], axis=1), state

    def _extend(self, tokens_BT: Array, state: ModelState, count_B: Array) -> tuple[Array, ModelState]:
        position_BT = state.length_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        x_BTC, layers = self._run(tokens_BT, position_BT, state, Extend(count_B))
        return x_BTC, ModelState(layers, state.length_B + count_B)

    def verify(
        self, tokens_BM: Int[Array, "B M"], tree: Tree, state: ModelState
    ) -> tuple[Float[Array, "B M C"], tuple[Any, ...]]:
        """Look at draft tokens: the nodes of a tree whose root follows the state.

        Returns:
            The features of every node, as if its path had been read; and what `commit` needs. The state stays.
        """
        position_BM = state.length_B[:, None] + jnp.asarray(tree.depth_M)[None]
        return self._run(tokens_BM, position_BM, state, Verify(tree))

    def commit(
        self, state: ModelState, pending: tuple[Any, ...], path_BP: Int[Array, "B P"], count_B: Int[Array, " B"]
    ) -> ModelState:
        """The state after the first `count_B` nodes of each row's path, which may be none.

        Args:
            state: that the nodes were verified with.
            pending: from `verify`.
            path_BP: nodes from the root downwards; entries from `count_B` on are not looked at.
            count_B: nodes to keep.
        """
        layer = self._without_parameters()
        pairs = zip(state.layers, pending, strict=True)
        states = tuple(layer.commit(before, of_layer, path_BP, count_B) for before, of_layer in pairs)
        return ModelState(states, state.length_B + count_B)

    def _run(
        self, tokens_BT: Array, position_BT: Array, state: ModelState, step: Step
    ) -> tuple[Array, tuple[Any, ...]]:
        x_BTC, shared = self.embed(tokens_BT, position_BT)
        results = []
        for layer, before in zip(each_layer(self.layers, self.config.depth), state.layers, strict=True):
            x_BTC, after = layer.decode(x_BTC, *shared, before, step)
            results.append(after)
        return self.norm(x_BTC), tuple(results)


def unstacked(model: LanguageModel) -> LanguageModel:
    """The model with its layers apart and without Medusa heads, for decoding.

    Reading layers from a stack would copy them at every step.
    """
    if isinstance(model.layers, nnx.List):
        return model
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, state)
    copy.medusa = None
    copy.layers = unstack_layers(model.layers, model.config.depth)
    return copy


def check_transformer(config: LlamaConfig | Gpt2Config, capacity: int) -> None:
    """Raise `ConfigError` for attention that cannot be decoded, or not so many tokens."""
    kinds = layer_kinds(config.attention, config.depth)
    require(
        "longlora" not in kinds,
        "attention.kind=longlora has groups that depend on a row's length, and cannot be decoded: "
        "convert the model with --attention softmax",
    )
    require(
        "softmax" not in kinds or capacity <= config.positions,
        f"{capacity} tokens are more than the positions={config.positions} of a model with softmax attention: "
        "ask for fewer",
    )
