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
from lin_jax.decode.generate import Generator, Progress
from lin_jax.evaluate.direct import DirectIntegration
from lin_jax.models.medusa import MedusaHeads
from lin_jax.ops.tree import Tree

_WARMUP, _REPEATS = 3, 30


def time_parts(generator: Generator, heads: MedusaHeads | None, progress: Progress) -> dict[str, float]:
    """Median seconds of a step of a batch, of its attention, feed-forward layers and heads, and what is left: rest.

    Attention is all that the layers do besides their feed-forward part: projections, norms, and keeping a path. The
    rest is the model's head, the choice, the acceptance, the text, and a call's overhead; parts that overlap or are
    fused in a whole step make it smaller. A model without feed-forward layers has 0 there, and so has one without
    heads.

    Args:
        generator: with `block=1`.
        heads: Medusa heads, if its steps use them.
        progress: of a batch that does not end soon; it must not be used any more.
    """
    model, tree = generator.model, generator.tree
    B, C = progress.features_BC.shape
    rows = (B * model.candidates, tree.height) if isinstance(model, DirectIntegration) else (B, tree.nodes)
    x_BMC = jnp.ones((*rows, C), progress.features_BC.dtype)
    of_heads = 0.0 if heads is None else _median(_guess(heads, tree, progress))
    of_feed = _median(_feed(model, x_BMC)) if hasattr(model.layers[0], "feed") else 0.0
    of_layers = _median(_layers(model, tree, jax.tree.map(jnp.copy, progress)))
    step = _median(_steps(generator, progress))
    parts = {"attention": of_layers - of_feed, "feed-forward": of_feed, "heads": of_heads}
    return {**parts, "rest": step - of_layers - of_heads, "step": step}


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


def _steps(generator: Generator, progress: Progress) -> Callable[[], Any]:
    """Whole steps, one a call."""

    def call() -> Any:
        nonlocal progress
        progress = generator.advance(progress)
        return progress

    return call
