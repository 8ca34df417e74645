"""Milliseconds a token behind sources of growing length: a T5 whose cross attention is linear, and softmax.

    python -m benchmarks.source_decode [--sources 100 1000 10000] [--batches 1 8] [--repeats 10]

A T5 of 6 + 6 layers and width 512 (T5-small) writes greedily, one token a step, by the library's own loop; the state
of a source is made once, before. The encoder, and the decoder's attention to its own tokens, are augmented in both.
Sources are timed in turn, so that a machine that is busy for a while slows all of them. The column "others" is the part
of the processor that other programs took meanwhile: with much of it, no figure counts.
"""

import argparse
import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import common
from lin_jax.decode.generate import Generator
from lin_jax.experiment import AugmentedConfig, GenerateConfig, SoftmaxConfig, T5Config
from lin_jax.models.registry import create_model

BOTH_WAYS = AugmentedConfig(group_size=64, causal=False)
CROSS = {"linear": BOTH_WAYS, "softmax": SoftmaxConfig(causal=False)}
WARMUP = 2


class Run:
    """One model behind one source: calling it writes a block of tokens."""

    def __init__(self, model: Any, source: int, batch: int, block: int):
        config = GenerateConfig(max_new_tokens=1 << 20, block=block)
        generator = Generator(model, dataclasses.replace(config, max_new_tokens=4096))
        tokens = np.random.default_rng(0).integers(0, model.config.vocabulary_size, (batch, source)).astype(np.int32)
        self.generator, self.progress = generator, generator.start(list(tokens), [0] * batch)
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(self.progress.state))

    def __call__(self) -> jax.Array:
        """Write a block."""
        self.progress = self.generator.advance(self.progress)
        return self.progress.state.length_B


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, nargs="+", default=[100, 1000, 10000], metavar="N")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--repeats", type=int, default=10, metavar="N")
    parser.add_argument("--block", type=int, default=16, metavar="N", help="tokens between looks at the clock")
    options = parser.parse_args()
    common.print_machine(common.describe_machine())
    rows = []
    for cross, attention in CROSS.items():
        config = T5Config(
            width=512,
            depth=6,
            encoder_depth=6,
            heads=8,
            feed_forward_size=2048,
            attention=AugmentedConfig(group_size=64),
            encoder_attention=BOTH_WAYS,
            cross_attention=attention,
        )
        model = create_model(config, nnx.Rngs(0))
        for batch in options.batches:
            runs = {str(source): Run(model, source, batch, options.block) for source in options.sources}
            others = common.Competition()
            times = common.time_interleaved(runs, options.repeats, WARMUP)
            share = common.percent(others.share())
            for source, timing in times.items():
                token = 1e3 * timing.median / options.block
                size = f"{runs[source].bytes / 1e6:.2f}"
                rows.append([cross, str(batch), source, f"{token:.2f}", size, share])
    common.print_table(["cross attention", "batch", "source tokens", "ms a step", "state MB", "others"], rows)


if __name__ == "__main__":
    main()
