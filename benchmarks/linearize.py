"""Linearizing a trained model, a table: python -m benchmarks.linearize --model DIR --stories FILE

Takes stories260K (a trained LLaMA in Hugging Face's form) and the sample of TinyStories, of which it holds out the last
200 stories, changes the attention, finetunes every variant on the same batches, and prints the validation perplexity of
each before and after. Every number is one run of train.py with configs/stories260k.py, whose directory is kept: started
again, only what is missing is run. `--split FILE --output DIR` only splits the stories.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lin_jax.train.metrics import read_metrics

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "stories260k.py"
HELD_OUT = 200
SEPARATOR = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant.

    `attention` are fields of `model.attention`, `optimizer` of `optimizer`; `steps` is a factor of --steps;
    `transfer` puts a first stage in front, which has the same number of steps.
    """

    attention: dict[str, Any]
    optimizer: dict[str, Any]
    transfer: bool = False


RELU = {"local": "relu2", "local_groups": 1, "feature_map": "relu"}
SOFTMAX_LOCAL = {"local": "softmax", "feature_map": "relu"}
# Learning rates were chosen on one seed among those that README names.
FAR = {"peak_learning_rate": 2e-3, "alpha_rate": 0.3}
NEAR = {"peak_learning_rate": 3e-4, "alpha_rate": 0.3}
ROWS = {
    "softmax": Row({"": "softmax"}, NEAR),
    "local": Row({"": "local", **RELU}, FAR),
    "local_grouped": Row({"": "local_grouped", **RELU}, FAR),
    "local_convolution": Row({"": "local_convolution", **RELU}, FAR),
    "augmented": Row({"": "augmented", **RELU}, FAR),
    "augmented, softmax-local": Row({"": "augmented", **SOFTMAX_LOCAL, "local_groups": 1}, NEAR),
    "augmented, softmax-local, R=2": Row({"": "augmented", **SOFTMAX_LOCAL, "local_groups": 2}, NEAR),
    "augmented, softmax-local, R=2, transfer": Row(
        {"": "augmented", **SOFTMAX_LOCAL, "local_groups": 2}, NEAR, transfer=True
    ),
}


def split_stories(file: Path, directory: Path) -> None:
    """Writes train.txt and valid.txt, which has the last `HELD_OUT` stories."""
    stories = [story.strip() for story in file.read_text(encoding="utf-8").split(SEPARATOR) if story.strip()]
    directory.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", stories[:-HELD_OUT]), ("valid", stories[-HELD_OUT:])):
        (directory / f"{name}.txt").write_text(SEPARATOR.join(part), encoding="utf-8")
    print(f"{len(stories) - HELD_OUT} stories in {directory}/train.txt, {HELD_OUT} in {directory}/valid.txt")


def run(program: str, *arguments: str) -> None:
    """Runs one of the programs, whose output is ours."""
    subprocess.run([sys.executable, str(ROOT / program), *arguments], check=True, stdout=sys.stderr)


def overrides(row: Row) -> list[str]:
    """The command line of a variant."""
    return [
        *(f"--config.model.attention{'.' if name else ''}{name}={value}" for name, value in row.attention.items()),
        *(f"--config.optimizer.{name}={value}" for name, value in row.optimizer.items()),
    ]


def train_row(name: str, seed: int, options: argparse.Namespace) -> list[tuple[int, float]]:
    """(step, validation perplexity) of a variant's run, which is made unless it is there."""
    row, label = ROWS[name], f"{name.replace(', ', '_')}_{seed}"
    workdir = options.output / "runs" / label
    base = options.output / "original"
    common = [
        f"--config.data.path={options.output / 'stories' / 'train.txt'}",
        f"--config.data.validation_path={options.output / 'stories' / 'valid.txt'}",
        f"--config.data.seed={seed}",
        f"--config.train.steps={options.steps}",
        f"--config.train.evaluate_every={options.steps}",
        "--config.train.log_every=50",
        "--config.checkpoint.every=100",
    ]
    if row.transfer:
        attention = overrides(Row(row.attention, {}))
        first = options.output / "runs" / f"{label}_stage1"
        where = [f"--config.workdir={first}", f"--config.finetune.checkpoint={base}"]
        run("train.py", "--config", f"{CONFIG}:transfer", *common, *attention, *where)
        base = first
    where = [f"--config.workdir={workdir}", f"--config.finetune.checkpoint={base}"]
    run("train.py", "--config", str(CONFIG), *common, *overrides(row), *where)
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if line.get("perplexity") is not None]
    return [(line["step"], line["perplexity"]) for line in lines]


def table(results: dict[str, dict[int, list[tuple[int, float]]]]) -> str:
    """Markdown: perplexity before and after, each seed, mean, and the distance to softmax."""
    means = {name: statistics.mean(points[-1][1] for points in seeds.values()) for name, seeds in results.items()}
    lines = ["| attention | before | after, each seed | mean | against softmax |", "|---|---|---|---|---|"]
    for name, seeds in results.items():
        before = next(iter(seeds.values()))[0][1]
        after = ", ".join(f"{points[-1][1]:.3f}" for points in seeds.values())
        distance = f"{means[name] / means['softmax'] - 1:+.1%}" if "softmax" in means else ""
        lines.append(f"| {name} | {before:.2f} | {after} | {means[name]:.3f} | {distance} |")
    return "\n".join(lines)


def draw(results: dict[str, dict[int, list[tuple[int, float]]]], file: Path) -> None:
    """A bar for every variant, a dot for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(results) + 1))
    for place, (name, seeds) in enumerate(results.items()):
        values = [points[-1][1] for points in seeds.values()]
        axes.barh(place, statistics.mean(values), color="tab:orange" if name == "softmax" else "tab:blue", alpha=0.5)
        axes.plot(values, [place] * len(values), "k.", markersize=4)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set(xlabel="validation perplexity", xlim=(4, None))
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="stories260K in Hugging Face's form")
    parser.add_argument("--stories", type=Path, metavar="FILE", help=f"stories separated by {SEPARATOR}")
    parser.add_argument("--split", type=Path, metavar="FILE", help="only split this file into --output")
    parser.add_argument("--output", type=Path, default=Path("runs/linearize"), metavar="DIR")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the order of batches")
    parser.add_argument("--steps", type=int, default=300, help="updates of 8 rows of 512 tokens")
    options = parser.parse_args(arguments)
    if options.split is None and (options.model is None or options.stories is None):
        parser.error("give --model and --stories, or --split")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.split is not None:
        split_stories(options.split, options.output)
        return
    split_stories(options.stories, options.output / "stories")
    if not (options.output / "original").exists():
        run("convert_weights.py", "--input", str(options.model), "--output", str(options.output / "original"))
    results: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for name in options.rows:
        for seed in options.seeds:
            results.setdefault(name, {})[seed] = train_row(name, seed, options)
            print(f"{name}, seed {seed}: {results[name][seed][-1][1]:.3f}", flush=True)
    print(f"\n{options.steps} steps\n\n{table(results)}")
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, options.output / "results.png")


if __name__ == "__main__":
    main()
