"""Measure a model: python eval.py --checkpoint runs/quickstart [--task perplexity|speculative] [...]

perplexity: perplexity and bits-per-byte; without --path, on the validation text that the run was trained with. Any
--config.data.field=value changes the data. speculative: tokens a step and a second with guesses and without.
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lin_jax
from lin_jax.config import ABLATIONS, ConfigError, GenerateConfig, MeshConfig
from lin_jax.evaluate.perplexity import evaluate_run
from lin_jax.evaluate.speculative import METHODS, compare_attentions, read_prompts, table
from lin_jax.overrides import apply_overrides
from lin_jax.train.saved_model import load_model


def make_parser() -> argparse.ArgumentParser:
    """The arguments of the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--task", choices=["perplexity", "speculative"], default="perplexity")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run's directory, or RUN/checkpoints/STEP")
    parser.add_argument("--batch-size", type=int, default=8, help="windows or texts at a time")
    parser.add_argument("--output", metavar="FILE", help="JSON file (default: RUN/evaluation.json or speculative.json)")
    perplexity = parser.add_argument_group("perplexity")
    perplexity.add_argument("--path", nargs="+", metavar="FILE", help="evaluate on all of these files or globs instead")
    perplexity.add_argument("--window", type=int, help="tokens the model sees at a time (default: as in training)")
    perplexity.add_argument("--stride", type=int, help="tokens between starts of windows (default: half the window)")
    speculative = parser.add_argument_group("speculative")
    speculative.add_argument("--prompts", metavar="FILE", help='.jsonl with "turns", "prompt" or "text", or a text')
    speculative.add_argument("--separator", default="<|endoftext|>", help="between the prompts of a text")
    speculative.add_argument("--limit", type=int, default=80, help="prompts; 0 takes all")
    speculative.add_argument("--longest", type=int, default=512, help="tokens to which a prompt is cut")
    speculative.add_argument("--max-new-tokens", type=int, default=128, help="tokens after which a text ends")
    speculative.add_argument("--methods", nargs="+", choices=METHODS, default=["plain", "medusa"])
    speculative.add_argument("--tree", default=GenerateConfig().tree, help="a published tree, or a .json file of paths")
    speculative.add_argument("--attention", nargs="+", choices=ABLATIONS, default=[], help="(default: the model's own)")
    speculative.add_argument("--split", action="store_true", help="also time the parts of a step")
    return parser


def perplexity(known: argparse.Namespace, overrides: list[str]) -> tuple[str, dict[str, Any]]:
    """The result as text and as a record."""
    model, tokenizer, config = load_model(known.checkpoint)
    if known.path:
        whole_files = ["source=text", "path=", f"validation_path={tuple(known.path)}"]
        overrides = [*(f"--config.data.{text}" for text in whole_files), *overrides]
    config = apply_overrides(dataclasses.replace(config, mesh=MeshConfig()), overrides)
    window = known.window if known.window is not None else config.data.sequence_length
    stride = known.stride if known.stride is not None else max(1, window // 2)
    result = evaluate_run(model, tokenizer, config, window=window, stride=stride, batch_size=known.batch_size)
    settings = {"checkpoint": known.checkpoint, "data": dataclasses.asdict(config.data)}
    return str(result), {**result.to_dict(), "window": window, "stride": stride, **settings}


def speculative(known: argparse.Namespace, overrides: list[str]) -> tuple[str, dict[str, Any]]:
    """The result as text and as a record."""
    if overrides:
        raise ConfigError(f"unknown argument {overrides[0]} for --task speculative")
    if known.prompts is None:
        raise ConfigError("--task speculative needs --prompts FILE")
    model, tokenizer = lin_jax.load(known.checkpoint)
    how = {"limit": known.limit, "longest": known.longest, "separator": known.separator}
    prompts = read_prompts(Path(known.prompts), tokenizer, **how)
    config = GenerateConfig(max_new_tokens=known.max_new_tokens, batch_size=known.batch_size, tree=known.tree)
    rows = compare_attentions(
        model, tokenizer, prompts, config, methods=known.methods, names=known.attention, split=known.split
    )
    return table(rows), {"rows": [dataclasses.asdict(row) for row in rows], "settings": vars(known)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # The checkpoint library warns of its own doings.
    known, overrides = make_parser().parse_known_args(arguments)
    try:
        task, name = (
            (speculative, "speculative.json") if known.task == "speculative" else (perplexity, "evaluation.json")
        )
        text, record = task(known, overrides)
        output = Path(known.output or Path(known.checkpoint) / name)
        output.write_text(json.dumps(record, indent=2) + "\n")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{text}\nwritten to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
