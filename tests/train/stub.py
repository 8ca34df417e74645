"""A very small language model with what training has to cope with: stacked layers, some without decay, a constant."""

import jax
import jax.numpy as jnp
from flax import nnx

from lin_jax.layers.parameter import constant, parameter

VOCABULARY, WIDTH, LAYERS = 96, 16, 3  # by default


class Layer(nnx.Module):
    def __init__(self, rngs, width):
        key = rngs.params()
        self.up = parameter(0.3 * jax.random.normal(key, (width, 2 * width)), axes=("width", "hidden"), decay=True)
        self.down = parameter(
            0.3 * jax.random.normal(jax.random.fold_in(key, 1), (2 * width, width)),
            axes=("hidden", "width"),
            decay=True,
        )
        self.scale = parameter(jnp.ones(width), axes=(None,), decay=False)

    def __call__(self, x_BTC, same_BTT):
        count = jnp.sum(same_BTT, axis=-1, keepdims=True)
        past = jnp.einsum("bts,bsc->btc", same_BTT, x_BTC) / jnp.maximum(count, 1)
        hidden = jax.nn.gelu((x_BTC + past) @ self.up.get_value())
        return x_BTC + jnp.tanh(hidden @ self.down.get_value()) * self.scale.get_value()[None, None]


class Stub(nnx.Module):
    def __init__(self, rngs, vocabulary=VOCABULARY, width=WIDTH):
        key = rngs.params()
        self.embedding = parameter(
            jax.random.normal(key, (vocabulary, width)), axes=("vocabulary", "width"), decay=False
        )
        self.layers = nnx.split_rngs(splits=LAYERS)(nnx.vmap(lambda rngs: Layer(rngs, width)))(rngs)
        self.temperature = constant(jnp.full((), 0.5), axes=())

    def features(self, tokens_BT, segment_ids_BT=None, partition=None):
        length = tokens_BT.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))[None]
        if segment_ids_BT is not None:
            same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
            causal = causal & same & (segment_ids_BT[:, :, None] > 0)
        mask = jnp.broadcast_to(causal, (tokens_BT.shape[0], length, length)).astype(jnp.float32)
        graph, layers = nnx.split(self.layers)

        def step(x, layer):
            return nnx.merge(graph, layer)(x, mask), None

        return jax.lax.scan(step, self.embedding.get_value()[tokens_BT], layers)[0]

    def head(self, hidden_BTC):
        return (hidden_BTC @ self.embedding.get_value().T).astype(jnp.float32) * self.temperature.get_value()

    def __call__(self, tokens_BT, segment_ids_BT=None):
        return self.head(self.features(tokens_BT, segment_ids_BT))
