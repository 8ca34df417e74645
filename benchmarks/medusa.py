"""Medusa heads on a trained model, from nothing to a table: python -m benchmarks.medusa --model DIR --stories FILE

Takes stories260K (a trained LLaMA in Hugging Face's form) and the sample of TinyStories, of which it holds out the last
200 stories. For softmax and for augmented attention, and for every finetuned `--run NAME=DIR` (the rows of
benchmarks.linearize are such runs), the model continues the beginnings of stories greedily, four heads learn from what
it wrote (configs/medusa_stories260k.py, the model frozen), and eval.py compares generation with and without them. The
tree is chosen by the heads' accuracies on one half of the held-out stories, the comparison is on the other half, or on
`--questions`. What a step has left in --output is not made again.
"""

import argparse
import dataclasses
import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import lin_jax
from benchmarks.linearize import ROOT, SEPARATOR, run, split_stories
from lin_jax.decode.own_texts import write_own_texts
from lin_jax.experiment import GenerateConfig

CONFIG = ROOT / "configs" / "medusa_stories260k.py"
ATTENTION = {
    "softmax": [],
    "augmented": [
        "--attention=augmented",
        *(f"--config.model.attention.{x}" for x in ("local=softmax", "feature_map=relu", "local_groups=2")),
    ],
}


def beginnings(file: Path, count: int, seed: int) -> list[str]:
    """The first 3 to 40 words of stories, in random order; a story may serve several times."""
    random = np.random.default_rng(seed)
    stories = [story.split() for story in file.read_text(encoding="utf-8").split(SEPARATOR) if story.strip()]
    chosen = [stories[number] for number in random.integers(0, len(stories), count)]
    return [" ".join(words[: random.integers(3, 41)]) for words in chosen]


def write_texts(base: Path, stories: Path, directory: Path, options: argparse.Namespace) -> None:
    """The model's own continuations of training stories, for training, and of held-out ones, for validation."""
    model, tokenizer = lin_jax.load(base)
    config = GenerateConfig(max_new_tokens=options.length, batch_size=100, block=64)
    directory.mkdir(parents=True)
    for name, count in (("valid", 200), ("train", options.texts)):
        prompts = beginnings(stories / f"{name}.txt", count, seed=len(name))
        with (directory / f"{name}.tmp").open("w", encoding="utf-8") as file:
            for written in write_own_texts(model, tokenizer, prompts, config, file):
                print(f"{name}: {written}/{count} texts", file=sys.stderr, flush=True)
        (directory / f"{name}.tmp").rename(directory / f"{name}.jsonl")


def halve(stories: Path) -> None:
    """Of the held-out stories, valid.txt keeps one half and test.txt gets the other."""
    held_out = (stories / "valid.txt").read_text(encoding="utf-8").split(SEPARATOR)
    for name, part in (("valid", held_out[::2]), ("test", held_out[1::2])):
        (stories / f"{name}.txt").write_text(SEPARATOR.join(part), encoding="utf-8")


def base_of(name: str, options: argparse.Namespace) -> Path:
    """The run with this attention, converted unless it is given or there."""
    if name in options.run:
        return options.run[name]
    base = options.output / name
    if not base.exists():
        run("convert_weights.py", "--input", str(options.model), "--output", str(base), *ATTENTION[name])
    return base


def attention_of(base: Path) -> list[str]:
    """The attention of a run as settings; of those that take no value, none is set in `CONFIG`."""
    attention = dataclasses.asdict(lin_jax.load(base)[0].config.attention)
    return [
        f"--config.model.attention.{field}={value}" for field, value in attention.items() if value not in (None, ())
    ]


def train_heads(name: str, options: argparse.Namespace) -> Path:
    """The run of heads."""
    base, texts, heads = base_of(name, options), options.output / f"{name}_texts", options.output / f"medusa_{name}"
    if not (texts / "train.jsonl").exists():
        write_texts(base, options.output / "stories", texts, options)
    begin = time.perf_counter()
    run(
        "train.py",
        *("--config", str(CONFIG), *attention_of(base)),
        *(f"--config.workdir={heads}", f"--config.finetune.checkpoint={base}"),
        *(f"--config.data.path={texts / 'train.jsonl'}", f"--config.data.validation_path={texts / 'valid.jsonl'}"),
        *(f"--config.train.steps={options.steps}", *options.set),
    )
    print(f"{name}: heads trained in {time.perf_counter() - begin:.0f} s", flush=True)
    return heads


def compare(name: str, heads: Path, prompts: Path, options: argparse.Namespace) -> None:
    """A table by eval.py, on the beginnings of `prompts`."""
    command = [
        *("eval.py", "--task", "speculative", "--checkpoint", str(heads)),
        *("--output", str(options.output / f"{name}_{prompts.parent.name}.json")),
        *("--prompts", str(prompts), "--longest", "24"),
        *("--limit", str(options.prompts), "--max_new_tokens", str(options.length), "--batch_size", "1", "--split"),
        *("--methods", *options.methods, "--tree", str(heads / "tree.json")),
    ]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def named(argument: str) -> tuple[str, Path]:
    name, _, directory = argument.partition("=")
    return name, Path(directory).absolute()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="stories260K in Hugging Face's form")
    parser.add_argument("--stories", type=Path, required=True, metavar="FILE", help=f"separated by {SEPARATOR}")
    parser.add_argument("--run", nargs="+", type=named, default=[], metavar="NAME=DIR", help="finetuned models")
    parser.add_argument("--kinds", nargs="*", choices=ATTENTION, default=list(ATTENTION), help="converted models")
    parser.add_argument("--questions", nargs="*", type=Path, default=[], metavar="FILE", help="more prompts, as JSONL")
    parser.add_argument("--output", type=Path, default=Path("runs/medusa"), metavar="DIR")
    parser.add_argument("--texts", type=int, default=2000, help="that the model writes for its heads")
    parser.add_argument("--length", type=int, default=160, help="tokens of each, and of those in the comparison")
    parser.add_argument("--steps", type=int, default=1000, help="updates of the heads")
    parser.add_argument("--prompts", type=int, default=50, help="in the comparison")
    parser.add_argument("--methods", nargs="+", default=["medusa", "lookup", "direct"])
    parser.add_argument("--set", nargs="+", default=[], metavar="--config.x=y", help="other settings of the training")
    return parser.parse_args()


def main() -> None:
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # The checkpoint library warns of its own doings.
    options = parse()
    options.output, options.run = options.output.absolute(), dict(options.run)
    stories = options.output / "stories"
    if not stories.exists():
        split_stories(options.stories, stories)
        halve(stories)
    for name in dict.fromkeys([*options.kinds, *options.run]):
        heads = train_heads(name, options)
        for prompts in (stories / "test.txt", *options.questions):
            compare(name, heads, prompts.absolute(), options)


if __name__ == "__main__":
    main()
