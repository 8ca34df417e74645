"""Headings of sections written by a small T5, a table: python -m benchmarks.headings --data DIR [--output DIR]

Makes pairs of WikiText's articles, each a section's text and its heading; trains configs/t5_headings.py with softmax
and with linearized attention in all three places, from the same random numbers; and prints ROUGE of the validation
headings before and after, greedy and by beam search, with the tokens per step of greedy decoding that guesses by
look-up. Every number is one run of train.py or eval.py, whose directory is kept: started again, only what is missing is
run. `--pairs DIR` only writes the pairs.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "t5_headings.py"
VARIANTS = ("softmax", "augmented")
FILES = {"train": "wiki.train.tokens", "valid": "wiki.valid.tokens", "test": "wiki.test.tokens"}
# " = Title = " begins an article, and more signs a section.
HEADING = re.compile(r"^ ((?:= ){1,4})(.+?) (?:= ?)+\s*$")
# What WikiText has for rare words, which no heading can be made of.
UNKNOWN = "<unk>"
LEAST_CHARACTERS = 200


def pairs_of(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Yield the sections with a heading of their own and enough text before the next one."""
    heading, text = "", list[str]()
    for line in [*lines, " = End = "]:
        found = HEADING.match(line)
        if found is None:
            text.append(line.strip())
            continue
        whole = " ".join(filter(None, text))
        if heading and UNKNOWN not in heading and len(whole) >= LEAST_CHARACTERS:
            yield {"text": whole, "heading": heading}
        heading, text = (found[2] if found[1] != "= " else ""), []


def write_pairs(data: Path, directory: Path) -> None:
    """Write train.jsonl, valid.jsonl and test.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, file in FILES.items():
        with (data / file).open(encoding="utf-8") as lines:
            pairs = [json.dumps(pair, ensure_ascii=False) for pair in pairs_of(lines)]
        (directory / f"{name}.jsonl").write_text("".join(f"{pair}\n" for pair in pairs), encoding="utf-8")
        print(f"{len(pairs):,} pairs in {directory / name}.jsonl")


def run(program: str, *arguments: str) -> None:
    """Run a program of this directory; what it prints goes to standard error."""
    subprocess.run([sys.executable, str(ROOT / program), *arguments], check=True, stdout=sys.stderr)


def trained(variant: str, pairs: Path, output: Path, overrides: Sequence[str]) -> tuple[Path, Path]:
    """Return the directories of a run of one step at a learning rate of next to nothing, and of the whole run."""
    files = [f"--config.data.path={pairs / 'train.jsonl'}", f"--config.data.validation_path={pairs / 'valid.jsonl'}"]
    start, end = output / f"{variant}_start", output / variant
    still = ["--config.train.steps=1", "--config.train.epochs=0", "--config.optimizer.warmup_steps=0"]
    still += ["--config.optimizer.peak_learning_rate=1e-12", "--config.finetune.generated_examples=0"]
    for directory, own in ((start, still), (end, [])):
        if not (directory / "headings.done").exists():
            config = [f"--config={CONFIG}:{variant}", f"--config.workdir={directory}"]
            run("train.py", *config, *files, *overrides, *own)
            (directory / "headings.done").touch()
    return start, end


def measured(directory: Path, name: str, *flags: str) -> dict[str, Any]:
    """Return the record of eval.py with these flags."""
    file = directory / f"summarize-{name}.json"
    if not file.exists():
        run("eval.py", "--task", "summarize", "--checkpoint", str(directory), "--output", str(file), *flags)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def texts_of(directory: Path, name: str) -> list[str]:
    """Return the texts beside a record."""
    lines = (directory / f"summarize-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the directory of wiki.train.tokens and so on")
    parser.add_argument("--pairs", type=Path, help="write the pairs there, and stop")
    parser.add_argument("--output", type=Path, default=Path("runs/headings"), help="directory of all runs")
    given, overrides = parser.parse_known_args()
    if given.pairs is not None:
        write_pairs(given.data, given.pairs)
        return
    pairs = given.output / "pairs"
    if not (pairs / "test.jsonl").exists():
        write_pairs(given.data, pairs)
    print("| attention | decoding | ROUGE-1 | ROUGE-2 | ROUGE-L | ROUGE-Lsum | tokens per step |\n|" + "---|" * 7)
    for variant in VARIANTS:
        start, end = trained(variant, pairs, given.output, overrides)
        rows = {
            "greedy, before training": measured(start, "greedy"),
            "greedy": measured(end, "greedy"),
            "greedy, guesses by look-up": measured(end, "lookup", "--draft", "lookup"),
            "beam search, 4 beams": measured(end, "beams", "--beams", "4"),
        }
        for name, found in rows.items():
            scores = [f"{found[kind]:.2f}" for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")]
            print(" | ".join(["", variant, name, *scores, f"{found['tokens_per_step']:.2f}", ""]).strip(), flush=True)
        same = texts_of(end, "greedy") == texts_of(end, "lookup")
        print(f"greedy texts with and without look-up are {'the same' if same else 'NOT THE SAME'}", file=sys.stderr)


if __name__ == "__main__":
    main()
