"""What `eval.py` can do: each task makes a text for people and a record for programs."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from lin_jax.convert.load import load
from lin_jax.evaluate.perplexity import evaluate_run
from lin_jax.evaluate.speculative import compare_attentions, read_prompts, table
from lin_jax.settings.base import ConfigError
from lin_jax.settings.command_line import apply_overrides
from lin_jax.settings.generate import GenerateConfig
from lin_jax.settings.mesh import MeshConfig
from lin_jax.train.saved_model import load_model

Outcome = tuple[str, dict[str, Any]]


def perplexity(known: argparse.Namespace, overrides: list[str]) -> Outcome:
    """Perplexity of the run, whose own data is used unless --path or `overrides` say otherwise."""
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


def speculative(known: argparse.Namespace, overrides: list[str]) -> Outcome:
    """Generation with guesses beside generation without."""
    if overrides:
        raise ConfigError(f"unknown argument {overrides[0]} for --task speculative")
    if known.prompts is None:
        raise ConfigError("--task speculative needs --prompts FILE")
    model, tokenizer = load(known.checkpoint)
    how = {"limit": known.limit, "longest": known.longest, "separator": known.separator}
    prompts = read_prompts(Path(known.prompts), tokenizer, **how)
    config = GenerateConfig(max_new_tokens=known.max_new_tokens, batch_size=known.batch_size, tree=known.tree)
    rows = compare_attentions(
        model, tokenizer, prompts, config, methods=known.methods, names=known.attention, split=known.split
    )
    return table(rows), {"rows": [dataclasses.asdict(row) for row in rows], "settings": vars(known)}


# Each with the name of its record in the run.
TASKS = {"perplexity": (perplexity, "evaluation.json"), "speculative": (speculative, "speculative.json")}
