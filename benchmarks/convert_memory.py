"""Memory of a conversion: a synthetic LLaMA in bfloat16, through convert_weights.py in each direction.

python -m benchmarks.convert_memory --gigabytes 2
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import tokenizers

from benchmarks.common import describe_machine, print_machine, print_table
from lin_jax.convert import checkpoint_files, llama
from lin_jax.convert.checkpoint_files import write_tensors
from lin_jax.convert.hugging_face import shapes_of
from lin_jax.convert.names import tensors_of
from lin_jax.convert.tensors import Tensor
from lin_jax.experiment import LlamaConfig, SoftmaxConfig

MIB = 1 << 20
# What a conversion imports, and nothing else.
EMPTY = "import convert_weights, jax, transformers; transformers.AutoTokenizer; jax.devices()"
RUN = "import sys, convert_weights; sys.exit(convert_weights.main(sys.argv[1:]))"
# Not getrusage, which counts what the parent held when it started the program.
PEAK = "\nprint(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
# Directories: one of Hugging Face is hf, one of lin_jax is run.
DIRECTIONS = (("hf", "run", "lin_jax"), ("run", "hf2", "hf"), ("hf", "hf3", "hf"), ("run", "run2", "lin_jax"))


def make_config(gigabytes: float) -> LlamaConfig:
    """LLaMA-2's proportions at a width of 2048, as deep as it takes."""
    config = LlamaConfig(
        width=2048,
        heads=16,
        key_value_heads=16,
        feed_forward_size=5504,
        depth=1,
        dtype="bfloat16",
        attention=SoftmaxConfig(),
    )
    ends = 2 * config.vocabulary_size * config.width
    layer = 4 * config.width**2 + 3 * config.width * config.feed_forward_size
    depth = max(1, round((gigabytes * 2**30 / 2 - ends) / layer))
    return dataclasses.replace(config, depth=depth)


def write_checkpoint(directory: Path, config: LlamaConfig) -> tuple[int, int]:
    """Random tensors in files of 512 MiB and a tokenizer; returns the bytes of all tensors and of the largest."""
    directory.mkdir()
    checkpoint_files.SHARD_BYTES = 512 * MIB
    random = np.random.default_rng(0)
    noise = (0.02 * random.standard_normal(1 << 20, np.float32)).astype(ml_dtypes.bfloat16)
    tensors = []
    for tensor in tensors_of(llama.name_table(config), shapes_of(config), config.depth):
        make = lambda shape=tensor.shape: np.resize(np.roll(noise, random.integers(1 << 20)), shape)  # noqa: E731
        tensors.append(Tensor(tensor.name, tensor.shape, np.dtype(ml_dtypes.bfloat16), make))
    write_tensors(directory, tensors)
    values = {**llama.config_to_hugging_face(config), "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "</s>": 1}, []))
    backend.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return sum(tensor.nbytes for tensor in tensors), max(tensor.nbytes for tensor in tensors)


def peak_of(code: str, *arguments: str) -> int:
    """Largest resident memory of a program, in bytes."""
    command = [sys.executable, "-c", code.replace("sys.exit(", "(") + PEAK, *arguments]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    return 1024 * int(printed.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--directory", type=Path, help="where the checkpoints lie meanwhile (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        measure(Path(name), make_config(arguments.gigabytes))


def measure(directory: Path, config: LlamaConfig) -> None:
    """Convert in every direction, and print what each took."""
    print_machine(describe_machine())
    small = dataclasses.replace(config, width=64, heads=2, key_value_heads=2, head_size=32, feed_forward_size=64)
    size, largest = write_checkpoint(directory / "hf", config)
    write_checkpoint(directory / "small_hf", small)
    stacked = max(math.prod(s.shape) * 2 for s in shapes_of(config).values())
    empty = peak_of(EMPTY)
    print(f"checkpoint {size / MIB:,.0f} MiB, largest tensor {largest / MIB:,.0f} MiB, the largest as lin_jax stacks")
    print(f"layers {stacked / MIB:,.0f} MiB; an interpreter with the same imports {empty / MIB:,.0f} MiB")
    rows = [measure_direction(directory, *direction, empty, size) for direction in DIRECTIONS]
    print_table(
        ("MiB", "peak", "more than interpreter + checkpoint", "peak of a tiny model", "more than tiny + it"), rows
    )


def measure_direction(directory: Path, begin: str, end: str, to: str, empty: int, size: int) -> tuple[str, ...]:
    """One line of the table: what a conversion took, and that of a model of next to nothing."""
    peak, least = (
        peak_of(RUN, "--input", f"{directory}/{kind}{begin}", "--output", f"{directory}/{kind}{end}", "--to", to)
        for kind in ("", "small_")
    )
    numbers = (peak, peak - empty - size, least, peak - least - size)
    return (f"{begin} to {end}", *(f"{number / MIB:,.0f}" for number in numbers))


if __name__ == "__main__":
    main()
