"""Where the time of a decoding step goes: its parts, compiled and timed by themselves on the shapes of the step."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lin_jax.decode.draft import from_heads
from lin_jax.decode.generate import Progress
from lin_jax.evaluate.direct import DirectIntegration
from lin_jax.models.medusa import MedusaHeads
from lin_jax.ops.tree import Tree

_WARMUP, _REPEATS = 3, 30


def time_parts(model: Any, heads: MedusaHeads | None, tree: Tree, progress: Progress) -> dict[str, float]:
    """Median seconds of attention, feed-forward layers and heads in a step of a batch.

    Attention is all that the layers do besides their feed-forward part: projections, norms, and what is kept of a path
    too. A model without feed-forward layers has 0 there, and so has one without heads.

    Args:
        model: as it decodes, with its layers apart.
        heads: Medusa heads, if the step uses them.
        tree: the nodes of the step.
        progress: of a batch; it must not be used any more.
    """
    B, C = progress.features_BC.shape
    rows = (B * model.candidates, tree.height) if isinstance(model, DirectIntegration) else (B, tree.nodes)
    x_BMC = jnp.ones((*rows, C), progress.features_BC.dtype)
    guess = (lambda: None) if heads is None else _guess(heads, tree, progress)
    feed = _feed(model, x_BMC) if hasattr(model.layers[0], "feed") else (lambda: None)
    of_heads, of_feed, of_layers = (_median(call) for call in (guess, feed, _layers(model, tree, progress)))
    return {"attention": of_layers - of_feed, "feed-forward": of_feed, "heads": of_heads}


def _median(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(_WARMUP + _REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[_WARMUP:])


def _guess(heads: MedusaHeads, tree: Tree, progress: Progress) -> Callable[[], Any]:
    graph, arrays = nnx.split(heads)
    run = jax.jit(lambda arrays, x_BC, next_B: from_heads(nnx.merge(graph, arrays)(x_BC), next_B, tree))
    return lambda: run(arrays, progress.features_BC, progress.next_B)


def _feed(model: Any, x_BMC: Array) -> Callable[[], Any]:
    graph, arrays = nnx.split(model)

    @jax.jit
    def run(arrays: Any, x_BMC: Array) -> Array:
        for layer in nnx.merge(graph, arrays).layers:
            x_BMC = layer.feed(x_BMC)
        return x_BMC

    return lambda: run(arrays, x_BMC)


def _layers(model: Any, tree: Tree, progress: Progress) -> Callable[[], Any]:
    """Verifies a tree and keeps its root, each call behind the last."""
    graph, arrays = nnx.split(model)
    tokens_BM = jnp.broadcast_to(progress.next_B[:, None], (len(progress.next_B), tree.nodes))
    path_BP = jnp.zeros((len(progress.next_B), tree.height), jnp.int32)
    state = progress.state

    def step(arrays: Any, state: Any) -> Any:
        model = nnx.merge(graph, arrays)
        x_BMC, pending = model.verify(tokens_BM, tree, state)
        # The commit has to wait for the features, as it does in generation; see `lin_jax.decode.generate`.
        count_B = jnp.all(jnp.isfinite(x_BMC), axis=(1, 2)).astype(jnp.int32)
        return model.commit(state, pending, path_BP, count_B)

    run = jax.jit(step, donate_argnums=1)

    def call() -> Any:
        nonlocal state
        state = run(arrays, state)
        return state

    return call
