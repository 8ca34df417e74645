"""Generation with guesses beside generation without."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lin_jax.attentions.registry import preset_names
from lin_jax.convert.load import load
from lin_jax.decode.trees import find_tree
from lin_jax.evaluate.speculative import METHODS, compare_attentions, encode_prompts, read_texts, table
from lin_jax.evaluate.tasks.base import EvaluationTask, Option, Outcome, whole
from lin_jax.settings.base import require
from lin_jax.settings.generate import GenerateConfig


class SpeculativeTask(EvaluationTask):
    """Tokens a step and a second with guesses and without."""

    record = "speculative"
    options = (
        Option(("--prompts",), '.jsonl with "turns", "prompt" or "text", or a text', how={"metavar": "FILE"}),
        Option(("--separator",), "between the prompts of a text", "<|endoftext|>", {"metavar": "TEXT"}),
        Option(("--limit",), "prompts; 0 takes all", 80, {"type": whole(0), "metavar": "N"}),
        Option(("--longest",), "tokens to which a prompt is cut", 512, {"type": whole(1), "metavar": "N"}),
        Option(
            ("--max_new_tokens", "--max-new-tokens"),
            "tokens after which a text ends",
            128,
            {"type": whole(1), "metavar": "N"},
        ),
        Option(("--methods",), "how tokens are guessed", ["plain", "medusa"], {"nargs": "+", "choices": list(METHODS)}),
        Option(("--tree",), "a published tree, or a .json file of paths", GenerateConfig().tree, {"metavar": "NAME"}),
        Option(("--attention",), "instead of the model's own", [], {"nargs": "+", "choices": preset_names()}),
        Option(("--split",), "also time the parts of a step", False, {"action": "store_true"}),
    )

    @classmethod
    def check(cls, known: argparse.Namespace, overrides: Sequence[str]) -> None:
        """Raise `ConfigError` for what is missing, or changes nothing beside the rest."""
        require(not overrides, f"unknown argument {' '.join(overrides[:1])} for --task speculative")
        require("prompts" in known, "--task speculative needs --prompts FILE")
        guessing = {"medusa", "direct"} & set(getattr(known, "methods", ["medusa"]))
        require(bool(guessing) or "tree" not in known, "--tree is for --methods medusa and direct")
        lines = str(known.prompts).endswith(".jsonl")
        require(not lines or "separator" not in known, "--separator is for prompts in a text, not in .jsonl")

    @classmethod
    def measure(cls, known: argparse.Namespace, overrides: Sequence[str]) -> Outcome:
        """Measure generation by every method."""
        config = GenerateConfig(max_new_tokens=known.max_new_tokens, batch_size=known.batch_size, tree=known.tree)
        if {"medusa", "direct"} & set(known.methods):
            find_tree(config.tree)
        texts = read_texts(Path(known.prompts), known.separator)
        model, tokenizer = load(known.checkpoint)
        prompts = encode_prompts(texts, tokenizer, limit=known.limit, longest=known.longest)
        rows = compare_attentions(
            model, tokenizer, prompts, config, methods=known.methods, names=known.attention, split=known.split
        )
        return Outcome(table(rows), {"rows": [dataclasses.asdict(row) for row in rows], "settings": vars(known)})
