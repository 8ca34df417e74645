"""The command line of `eval.py`."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from lin_jax.attentions.registry import preset_names
from lin_jax.evaluate.speculative import METHODS
from lin_jax.settings.base import require
from lin_jax.settings.command_line import OneLineParser
from lin_jax.settings.generate import GenerateConfig

# The options of each task, with what they are where they are not given.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "perplexity": {"path": None, "window": None, "stride": None},
    "speculative": {
        "prompts": None,
        "separator": "<|endoftext|>",
        "limit": 80,
        "longest": 512,
        "max_new_tokens": 128,
        "methods": ["plain", "medusa"],
        "tree": GenerateConfig().tree,
        "attention": [],
        "split": False,
    },
}
_MOST = 2**24


def parse(description: str | None, arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return what a command line asks for, and its settings `--config...`, which are not looked at here.

    Raises:
        ConfigError: it is wrong, or gives an option that the task does not use.
    """
    known, overrides = _make_parser(description).parse_with_settings(arguments)
    for task, defaults in _DEFAULTS.items():
        given = [f"--{name}" for name in defaults if name in known]
        require(task == known.task or not given, f"{', '.join(given)}: for --task {task}, not {known.task}")
    if known.task == "speculative":
        _check_speculative(known, overrides)
    for name, default in _DEFAULTS[known.task].items():
        setattr(known, name, getattr(known, name, default))
    return known, overrides


def _check_speculative(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for what is missing, or changes nothing beside the rest."""
    require(not overrides, f"unknown argument {' '.join(overrides[:1])} for --task speculative")
    require("prompts" in known, "--task speculative needs --prompts FILE")
    guessing = {"medusa", "direct"} & set(getattr(known, "methods", ["medusa"]))
    require(bool(guessing) or "tree" not in known, "--tree is for --methods medusa and direct")
    lines = str(known.prompts).endswith(".jsonl")
    require(not lines or "separator" not in known, "--separator is for prompts in a text, not in .jsonl")


def _make_parser(description: str | None) -> OneLineParser:
    """Return the parser; its errors are raised as `ConfigError`."""
    parser = OneLineParser(description)
    parser.add_argument("--task", choices=list(_DEFAULTS), default="perplexity")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run's directory, or RUN/checkpoints/STEP")
    # Earlier versions spelled this and --max_new_tokens with hyphens.
    of_batch = "windows or texts at a time"
    parser.add_argument("--batch_size", "--batch-size", type=_whole(1, 2**16), default=8, metavar="N", help=of_batch)
    parser.add_argument("--output", metavar="FILE", help="JSON (default: evaluation.json or speculative.json in RUN)")
    perplexity = _group(parser, "perplexity")
    perplexity("--path", nargs="+", metavar="FILE", help="evaluate on all of these files or globs instead")
    perplexity("--window", type=_whole(1), metavar="N", help="tokens seen at a time (default: as in training)")
    perplexity("--stride", type=_whole(1), metavar="N", help="tokens between starts of windows (default: half)")
    speculative = _group(parser, "speculative")
    speculative("--prompts", metavar="FILE", help='.jsonl with "turns", "prompt" or "text", or a text')
    speculative("--separator", metavar="TEXT", help="between the prompts of a text")
    speculative("--limit", type=_whole(0), metavar="N", help="prompts; 0 takes all")
    speculative("--longest", type=_whole(1), metavar="N", help="tokens to which a prompt is cut")
    of_texts = "tokens after which a text ends"
    speculative("--max_new_tokens", "--max-new-tokens", type=_whole(1), metavar="N", help=of_texts)
    speculative("--methods", nargs="+", choices=METHODS, help="how tokens are guessed")
    speculative("--tree", metavar="NAME", help="a published tree, or a .json file of paths")
    speculative("--attention", nargs="+", choices=preset_names(), help="instead of the model's own")
    speculative("--split", action="store_true", help="also time the parts of a step")
    return parser


def _group(parser: argparse.ArgumentParser, task: str) -> Callable[..., None]:
    """Return what adds an option of a task; one that is not given is left out of what is parsed."""
    group = parser.add_argument_group(task)

    def add(*names: str, help: str, **how: Any) -> None:
        default = _DEFAULTS[task][names[0].removeprefix("--")]
        shown = " ".join(default) if isinstance(default, list) else default
        told = f"{help} (default: {shown})" if default not in (None, False, []) else help
        group.add_argument(*names, default=argparse.SUPPRESS, help=told.replace("%", "%%"), **how)

    return add


def _whole(least: int, most: int = _MOST) -> Callable[[str], int]:
    """Return a reader of whole numbers in a range."""

    def read(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must lie between {least} and {most}, but is {value}")
        return value

    read.__name__ = "whole number"  # argparse says "invalid whole number value"
    return read
