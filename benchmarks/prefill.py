"""Peak memory of a long prompt: read in chunks and continued, each length in a process of its own.

    python -m benchmarks.prefill [--lengths 10000 100000] [--chunk 512] [--attention augmented]

A LLaMA of random parameters reads a prompt of random tokens and generates 32 more, by the library's own loop.
"""

import argparse
import subprocess
import sys
import time

import numpy as np
from flax import nnx

from benchmarks.common import describe_machine, print_machine, print_table
from lin_jax.decode.generate import generate_tokens
from lin_jax.experiment import AugmentedConfig, GenerateConfig, LlamaConfig, SoftmaxConfig
from lin_jax.models.registry import create_model

NEW = 32
# Softmax attention is for comparison: its cache grows.
KINDS = {"augmented": AugmentedConfig(group_size=64), "softmax": SoftmaxConfig()}


def make_model(options: argparse.Namespace):
    config = LlamaConfig(
        vocabulary_size=4096,
        width=options.width,
        depth=4,
        heads=4,
        key_value_heads=4,
        head_size=options.width // 4,
        feed_forward_size=options.width * 11 // 4,
        positions=max(options.lengths) + NEW,
        attention=KINDS[options.attention],
    )
    return create_model(config, nnx.Rngs(0))


def read(options: argparse.Namespace) -> None:
    """Read one prompt and continue it; print the peak in MiB, seconds, and tokens generated."""
    [length] = options.lengths
    model = make_model(options)
    prompt = np.random.default_rng(0).integers(0, 4096, length, np.int32)
    begin = time.perf_counter()
    [row] = generate_tokens(model, GenerateConfig(max_new_tokens=NEW, prefill_chunk=options.chunk), [prompt])
    seconds = time.perf_counter() - begin
    # Not getrusage, which counts what the parent held when it started the program.
    with open("/proc/self/status", encoding="utf-8") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    print(peak, seconds, len(row.tokens))


def measure(length: int, options: argparse.Namespace) -> tuple[float, float, int]:
    """What `read` prints, of a process of its own."""
    settings = {"lengths": length, "chunk": options.chunk, "width": options.width, "attention": options.attention}
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.prefill", "--alone", *arguments]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8").stdout
    peak, seconds, tokens = printed.splitlines()[-1].split()
    return float(peak), float(seconds), int(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[10_000, 100_000], help="tokens of the prompts")
    parser.add_argument("--chunk", type=int, default=512, help="tokens that are read at a time")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--attention", choices=KINDS, default="augmented")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        read(options)
        return
    print_machine(describe_machine())
    found = {length: measure(length, options) for length in options.lengths}
    rows = [(f"{n:,}", f"{peak:.0f}", f"{s:.1f}", str(new)) for n, (peak, s, new) in found.items()]
    print_table(("prompt", "peak MiB", "seconds, compilation included", "generated"), rows)
    least, most = (found[f(found)][0] for f in (min, max))
    print(f"peak at {max(found):,} tokens: {most / least:.3f} times that at {min(found):,}")


if __name__ == "__main__":
    main()
