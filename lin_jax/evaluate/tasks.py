"""What `eval.py` can do: each task makes a text for people and a record for programs."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from lin_jax.convert.load import load
from lin_jax.decode.trees import find_tree
from lin_jax.evaluate.perplexity import evaluate_run
from lin_jax.evaluate.speculative import compare_attentions, encode_prompts, read_texts, table
from lin_jax.paths import is_remote, require_writable
from lin_jax.settings.command_line import apply_overrides
from lin_jax.settings.generate import GenerateConfig
from lin_jax.settings.mesh import MeshConfig
from lin_jax.train.saved_model import load_model
from lin_jax.train.workdir import workdir_and_step

Outcome = tuple[str, dict[str, Any]]


def perplexity(known: argparse.Namespace, overrides: list[str]) -> Outcome:
    """Measure perplexity of the run, whose own data is used unless --path or `overrides` say otherwise."""
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
    """Measure generation with guesses beside generation without."""
    config = GenerateConfig(max_new_tokens=known.max_new_tokens, batch_size=known.batch_size, tree=known.tree)
    if {"medusa", "direct"} & set(known.methods):
        find_tree(config.tree)
    texts = read_texts(Path(known.prompts), known.separator)
    model, tokenizer = load(known.checkpoint)
    prompts = encode_prompts(texts, tokenizer, limit=known.limit, longest=known.longest)
    rows = compare_attentions(
        model, tokenizer, prompts, config, methods=known.methods, names=known.attention, split=known.split
    )
    return table(rows), {"rows": [dataclasses.asdict(row) for row in rows], "settings": vars(known)}


# Each with the name of its record.
TASKS: dict[str, tuple[Callable[[argparse.Namespace, list[str]], Outcome], str]] = {
    "perplexity": (perplexity, "evaluation"),
    "speculative": (speculative, "speculative"),
}


def output_file(known: argparse.Namespace) -> epath.Path:
    """Return where the record of a task is written: in the run, or here for a model that has no directory.

    Raises:
        ConfigError: it cannot be written.
    """
    workdir, step = workdir_and_step(os.path.expanduser(known.checkpoint))
    name = f"{TASKS[known.task][1]}{'' if step is None else f'-{step}'}.json"
    directory = epath.Path(workdir) if is_remote(workdir) or os.path.isdir(workdir) else epath.Path()
    file = epath.Path(known.output) if known.output else directory / name
    require_writable(file, "--output")
    return file
