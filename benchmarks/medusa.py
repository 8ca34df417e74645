"""Medusa heads on a trained model, from nothing to a table: python -m benchmarks.medusa --model DIR --stories FILE

Takes stories260K (a trained LLaMA in Hugging Face's form) and the sample of TinyStories, of which it holds out the last
200 stories. For softmax and for augmented attention the model continues the beginnings of stories greedily, four heads
learn from what it wrote (configs/medusa_stories260k.py, the model frozen), and eval.py compares generation with and
without them on the beginnings of the held-out stories. What a step has left in --output is not made again.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import lin_jax
from benchmarks.linearize import ROOT, SEPARATOR, run, split_stories
from lin_jax.config import GenerateConfig
from lin_jax.decode.own_texts import write_own_texts

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
    stories = [story.split() for story in file.read_text().split(SEPARATOR) if story.strip()]
    chosen = [stories[number] for number in random.integers(0, len(stories), count)]
    return [" ".join(words[: random.integers(3, 41)]) for words in chosen]


def write_texts(base: Path, stories: Path, directory: Path, options: argparse.Namespace) -> None:
    """The model's own continuations of training stories, for training, and of held-out ones, for validation."""
    model, tokenizer = lin_jax.load(base)
    config = GenerateConfig(max_new_tokens=options.length, batch_size=100, block=64)
    directory.mkdir(parents=True)
    for name, count in (("valid", 200), ("train", options.texts)):
        prompts = beginnings(stories / f"{name}.txt", count, seed=len(name))
        with (directory / f"{name}.tmp").open("w") as file:
            for written in write_own_texts(model, tokenizer, prompts, config, file):
                print(f"{name}: {written}/{count} texts", file=sys.stderr, flush=True)
        (directory / f"{name}.tmp").rename(directory / f"{name}.jsonl")


def base_of(kind: str, options: argparse.Namespace) -> Path:
    """The run with this attention, converted unless it is given or there."""
    given = getattr(options, kind)
    if given is not None:
        return given
    base = options.output / kind
    if not base.exists():
        run("convert_weights.py", "--input", str(options.model), "--output", str(base), *ATTENTION[kind])
    return base


def train_heads(kind: str, options: argparse.Namespace) -> Path:
    """The run of heads."""
    base, texts, heads = base_of(kind, options), options.output / f"{kind}_texts", options.output / f"medusa_{kind}"
    if not (texts / "train.jsonl").exists():
        write_texts(base, options.output / "stories", texts, options)
    begin = time.perf_counter()
    run(
        "train.py",
        *("--config", f"{CONFIG}:{kind}"),
        *(f"--config.workdir={heads}", f"--config.finetune.checkpoint={base}"),
        *(f"--config.data.path={texts / 'train.jsonl'}", f"--config.data.validation_path={texts / 'valid.jsonl'}"),
        *(f"--config.train.steps={options.steps}", *options.set),
    )
    print(f"{kind}: heads trained in {time.perf_counter() - begin:.0f} s", flush=True)
    return heads


def compare(kind: str, heads: Path, options: argparse.Namespace) -> list[dict]:
    """Rows of eval.py on the beginnings of held-out stories."""
    output = options.output / f"{kind}.json"
    command = [
        *("eval.py", "--task", "speculative", "--checkpoint", str(heads), "--output", str(output)),
        *("--prompts", str(options.output / "stories" / "valid.txt"), "--longest", "24"),
        *("--limit", str(options.prompts), "--max-new-tokens", str(options.length), "--batch-size", "1", "--split"),
        *("--methods", *options.methods, "--tree", str(heads / "tree.json")),
    ]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return json.loads(output.read_text())["rows"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="stories260K in Hugging Face's form")
    parser.add_argument("--stories", type=Path, required=True, metavar="FILE", help=f"separated by {SEPARATOR}")
    parser.add_argument("--softmax", type=Path, metavar="RUN", help="instead of the converted model")
    parser.add_argument("--augmented", type=Path, metavar="RUN", help="finetuned, instead of the converted model")
    parser.add_argument("--kinds", nargs="+", choices=ATTENTION, default=list(ATTENTION))
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
    options.output = options.output.absolute()
    if not (options.output / "stories").exists():
        split_stories(options.stories, options.output / "stories")
    for kind in options.kinds:
        compare(kind, train_heads(kind, options), options)


if __name__ == "__main__":
    main()
