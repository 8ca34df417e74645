"""Milliseconds a token at growing contexts: augmented attention, softmax attention with a cache, and recomputation.

    python -m benchmarks.decode [--contexts 256 1024 4096 16384 65536] [--batches 1 16] [--repeats 10] [--json FILE]

A LLaMA of 4 layers and width 512 generates greedily, one token a step, by the library's own loop. States are made of
random numbers with the length of the context, not read from a text: time does not depend on what is in them. A cache
of more than `--cache-gigabytes` is left out. `recompute` reads the whole context for every token, as the official code
does, by the fastest form there is for it (augmented attention, the training pass), at `--recompute-context`.

Contexts are timed in turn, so that a machine that is busy for a while slows all of them. The column "others" is the
part of the processor that other programs took meanwhile: with much of it, no figure counts.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import common
from lin_jax.decode.generate import Generator, Progress
from lin_jax.experiment import AugmentedConfig, GenerateConfig, LlamaConfig, SoftmaxConfig
from lin_jax.models.base import DecoderState
from lin_jax.models.registry import create_model

WARMUP = 2
KINDS = {"augmented": AugmentedConfig(group_size=64), "softmax": SoftmaxConfig()}


def make_model(kind: str, options: argparse.Namespace) -> Any:
    """4 layers of width 512, with parameters that are all in use."""
    config = LlamaConfig(
        vocabulary_size=options.vocabulary,
        width=512,
        depth=4,
        heads=8,
        key_value_heads=8,
        head_size=64,
        feed_forward_size=1376,
        positions=2 * max(*options.contexts, options.recompute_context),
        attention=KINDS[kind],
    )
    model = create_model(config, nnx.Rngs(0))
    return model


def filled(state: DecoderState, length: int) -> DecoderState:
    """The state with random numbers in place of its zeros, and this length."""
    random = np.random.default_rng(0)

    def fill(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.int32:
            return jnp.full_like(x, length)
        return jnp.asarray(0.1 * random.standard_normal(x.shape, np.float32), x.dtype)

    return jax.tree.map(fill, state)


def state_bytes(state: DecoderState) -> int:
    """Bytes of all arrays of a state."""
    return sum(x.nbytes for x in jax.tree.leaves(state))


@dataclasses.dataclass
class Run:
    """One kind of attention at one context: calling it generates a block of tokens."""

    generator: Generator
    progress: Progress

    def __call__(self) -> jax.Array:
        """A block of steps."""
        self.progress = self.generator.advance(self.progress)
        return self.progress.next_B


def start(model: Any, context: int, batch: int, options: argparse.Namespace) -> Run:
    """A run whose state is that of `batch` texts of `context` tokens."""
    tokens = options.steps * (options.repeats + WARMUP)
    generator = Generator(model, GenerateConfig(max_new_tokens=tokens, block=options.steps))
    progress = generator.start([np.zeros(1, np.int32)] * batch, [0] * batch)
    state = filled(model.empty_state(batch, context + tokens), context)
    text_BX = jnp.zeros((batch, context + tokens), jnp.int32)
    return Run(generator, dataclasses.replace(progress, state=state, text_BX=text_BX))


def cache_bytes(context: int, batch: int, options: argparse.Namespace) -> int:
    """Bytes of the cache: keys and values of 4 layers, in float32."""
    return 4 * 2 * 512 * 4 * batch * (context + options.steps * (options.repeats + WARMUP))


def recompute(model: Any, context: int) -> Callable[[], jax.Array]:
    """The next token, all tokens before it read again."""
    graph, arrays = nnx.split(model)
    tokens_BT = jnp.zeros((1, context), jnp.int32)

    @jax.jit
    def run(arrays, tokens_BT):
        model = nnx.merge(graph, arrays)
        return jnp.argmax(model.head(model.features(tokens_BT)[:, -1]), axis=-1)

    return lambda: run(arrays, tokens_BT)


def measure(batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every context and kind."""
    models = {kind: make_model(kind, options) for kind in KINDS}
    rows, competition = [], common.Competition()
    for kind, model in models.items():
        limit = options.cache_gigabytes * 1e9 if kind == "softmax" else float("inf")
        fits = [context for context in options.contexts if cache_bytes(context, batch, options) <= limit]
        runs = {str(context): start(model, context, batch, options) for context in fits}
        sizes = {name: state_bytes(run.progress.state) for name, run in runs.items()}
        timings = common.time_interleaved(runs, options.repeats, WARMUP)
        for name, timing in timings.items():
            rows.append(
                {
                    "kind": kind,
                    "batch": batch,
                    "context": int(name),
                    "milliseconds": 1e3 * timing.median / options.steps,
                    "least": 1e3 * timing.minimum / options.steps,
                    "state_bytes": sizes[name],
                }
            )
        del runs
    if batch == 1:
        function = {"recompute": recompute(models["augmented"], options.recompute_context)}
        timing = common.time_interleaved(function, options.repeats, WARMUP)["recompute"]
        row = {"kind": "recompute", "batch": 1, "context": options.recompute_context, "state_bytes": 0}
        rows.append(row | {"milliseconds": 1e3 * timing.median, "least": 1e3 * timing.minimum})
    for row in rows:
        row["others"] = competition.share()
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table of one batch size."""
    header = ["attention", "batch", "context", "ms/token", "least", "tokens/s", "state MB", "others"]
    cells = [
        [
            row["kind"],
            str(row["batch"]),
            str(row["context"]),
            f"{row['milliseconds']:.2f}",
            f"{row['least']:.2f}",
            f"{1e3 * row['batch'] / row['milliseconds']:.0f}",
            f"{row['state_bytes'] / 1e6:.2f}",
            common.percent(row["others"]),
        ]
        for row in rows
    ]
    common.print_table(header, cells)


def summarise(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """What the figures are measured for: flat time and state, and the distance to recomputation."""
    for batch in options.batches:
        own = {row["context"]: row for row in rows if row["kind"] == "augmented" and row["batch"] == batch}
        first, last = own[min(own)], own[max(own)]
        ratio = last["milliseconds"] / first["milliseconds"]
        sizes = len({row["state_bytes"] for row in own.values()})
        print(
            f"augmented, batch {batch}: a token at {max(own)} costs {ratio:.2f} x one at {min(own)} "
            f"(least times: {last['least'] / first['least']:.2f} x); {sizes} size(s) of state"
        )
    at = {row["kind"]: row for row in rows if row["batch"] == 1 and row["context"] == options.recompute_context}
    if {"augmented", "recompute"} <= at.keys():
        ratio = at["recompute"]["milliseconds"] / at["augmented"]["milliseconds"]
        print(f"augmented at {options.recompute_context}: {ratio:.0f} times the tokens/s of recomputing the prefix")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 16384, 65536])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=32, help="tokens in a measured call")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--recompute-context", type=int, default=4096)
    parser.add_argument("--cache-gigabytes", type=float, default=4.0, help="larger caches are left out")
    parser.add_argument("--json", help="file for the result")
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    options = parse_options()
    facts = common.describe_machine()
    common.print_machine(facts)
    rows: list[dict[str, Any]] = []
    for batch in options.batches:
        new = measure(batch, options)
        print_rows(new)
        rows += new
    summarise(rows, options)
    common.write_json(options.json, {"machine": facts, "rows": rows})


if __name__ == "__main__":
    main()
