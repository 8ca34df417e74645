"""Measures of a classifier, and its predictions, on a run's validation examples or any table."""

import argparse
import dataclasses
from collections.abc import Sequence

import numpy as np

from lin_jax.data.examples import Examples, are_numbers, glue_task, labels_of, open_examples, test_names
from lin_jax.evaluate.classify import logits_of, require_classifier
from lin_jax.evaluate.tasks.base import EvaluationTask, Option, Outcome
from lin_jax.settings.base import require
from lin_jax.settings.command_line import apply_overrides
from lin_jax.settings.data import DataConfig
from lin_jax.settings.mesh import MeshConfig
from lin_jax.tasks.classification import Classification
from lin_jax.train.saved_model import load_model


class ClassificationTask(EvaluationTask):
    """Measures of a run of classification, with a prediction for every example in a .tsv beside the record."""

    record = "classification"
    options = (
        Option(
            ("--path",),
            "evaluate on all of these tables instead; their columns are those of training unless "
            "--config.data.text_field and so on say otherwise; without labels they are only predicted",
            how={"nargs": "+", "metavar": "FILE"},
        ),
    )

    @classmethod
    def measure(cls, known: argparse.Namespace, overrides: Sequence[str]) -> Outcome:
        """Measure the run, whose validation examples are used without --path."""
        model, tokenizer, config = load_model(known.checkpoint)
        require_classifier(model)
        config = dataclasses.replace(config, mesh=MeshConfig())
        task = config.finetune.objective
        require(
            task == "classification",
            f"{known.checkpoint} was trained for finetune.objective={task}, and --task classification measures what "
            "classification made",
        )
        sizes = [f"--config.data.batch_size={known.batch_size}", "--config.train.microbatches=1"]
        table = _as_table(config.data, known.path) if known.path else []
        config = apply_overrides(config, [*sizes, *table, *overrides])
        found = Classification(config)
        told, record, files = [], dict[str, object](), dict[str, str]()
        for name in ("test",) if known.path else (*found.validation_sets, *test_names(config.data)):
            examples = open_examples(config.data, name)
            labels = labels_of(examples, config.data, config.model.label_names)  # type: ignore[attr-defined]
            rows = {
                "logits": logits_of(model, tokenizer, examples, config.data),
                "labels": labels,
                "examples": np.arange(len(examples)),
            }
            values = found.values(rows, tokenizer) if examples.labels is not None else {}
            told.append(f"{_told(examples)}: {found.describe(values) or 'no labels, predictions only'}")
            record[name or "validation"] = {"examples": len(examples), "file": examples.name, **values}
            files[f".{name}.tsv" if name and not known.path else ".tsv"] = found.predictions(rows)
        settings = {"checkpoint": known.checkpoint, "data": dataclasses.asdict(config.data)}
        return Outcome("\n".join(told), {**record, **settings}, files)


def _told(examples: Examples) -> str:
    return f"{len(examples)} examples of {examples.name}"


def _as_table(data: DataConfig, paths: Sequence[str]) -> list[str]:
    """Return the settings that read tables with the columns of the run's data."""
    glue = glue_task(data)
    found = {"source": "table", "test_path": repr(tuple(paths))}
    if glue is not None:
        found |= {"text_field": glue.texts[0], "second_field": glue.texts[1] if len(glue.texts) > 1 else ""}
        found |= {"label_field": glue.label, "label_kind": "number" if are_numbers(data) else "class"}
    return [f"--config.data.{name}={value}" for name, value in found.items()]
