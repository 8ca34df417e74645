"""Perplexity and bits per byte of whole documents."""

import argparse
import dataclasses
from collections.abc import Sequence

from lin_jax.evaluate.perplexity import evaluate_run
from lin_jax.evaluate.tasks.base import EvaluationTask, Option, Outcome, whole
from lin_jax.settings.command_line import apply_overrides
from lin_jax.settings.mesh import MeshConfig
from lin_jax.train.saved_model import load_model


class PerplexityTask(EvaluationTask):
    """Perplexity of a run, on its own data unless --path or settings of the data say otherwise."""

    record = "evaluation"
    options = (
        Option(("--path",), "evaluate on all of these files or globs instead", how={"nargs": "+", "metavar": "FILE"}),
        Option(
            ("--window",),
            "tokens seen at a time (default: as in training)",
            how={"type": whole(1), "metavar": "N"},
        ),
        Option(
            ("--stride",),
            "tokens between starts of windows (default: half)",
            how={"type": whole(1), "metavar": "N"},
        ),
    )

    @classmethod
    def measure(cls, known: argparse.Namespace, overrides: Sequence[str]) -> Outcome:
        """Measure the run."""
        model, tokenizer, config = load_model(known.checkpoint)
        if known.path:
            whole_files = ["source=text", "path=", f"validation_path={tuple(known.path)}"]
            overrides = [*(f"--config.data.{text}" for text in whole_files), *overrides]
        config = apply_overrides(dataclasses.replace(config, mesh=MeshConfig()), overrides)
        window = known.window if known.window is not None else config.data.sequence_length
        stride = known.stride if known.stride is not None else max(1, window // 2)
        result = evaluate_run(model, tokenizer, config, window=window, stride=stride, batch_size=known.batch_size)
        settings = {"checkpoint": known.checkpoint, "data": dataclasses.asdict(config.data)}
        return Outcome(str(result), {**result.to_dict(), "window": window, "stride": stride, **settings})
