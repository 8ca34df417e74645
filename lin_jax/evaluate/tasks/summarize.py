"""ROUGE of the targets that a model writes of sources, and the texts themselves."""

import argparse
import dataclasses
import json
from collections.abc import Sequence

from lin_jax.data.examples import open_pairs
from lin_jax.decode.text import TextGenerator
from lin_jax.evaluate.tasks.base import EvaluationTask, Option, Outcome, whole
from lin_jax.models.registry import MODELS
from lin_jax.settings.base import require
from lin_jax.settings.command_line import apply_overrides
from lin_jax.settings.generate import GenerateConfig
from lin_jax.settings.mesh import MeshConfig
from lin_jax.tasks.seq2seq import text_measures, validation_sample, written
from lin_jax.train.saved_model import load_model


class SummarizeTask(EvaluationTask):
    """ROUGE-1, 2, L and Lsum of a run of objective=seq2seq, with every text in a .jsonl beside the record."""

    record = "summarize"
    options = (
        Option(
            ("--path",),
            "evaluate on all of these tables instead; their columns are those of training unless "
            "--config.data.text_field and --config.data.target_field say otherwise",
            how={"nargs": "+", "metavar": "FILE"},
        ),
        Option(("--limit",), "examples, spread over all; 0 takes all", 0, {"type": whole(0), "metavar": "N"}),
        Option(
            ("--max_new_tokens", "--max-new-tokens"),
            "tokens after which a text ends (default: data.target_length)",
            how={"type": whole(1), "metavar": "N"},
        ),
        Option(("--beams",), "of beam search; 1 is greedy", 1, {"type": whole(1, 1024), "metavar": "N"}),
        Option(("--length_penalty",), "of beam search", 1.0, {"type": float, "metavar": "X"}),
        Option(("--draft",), "what guesses tokens; the texts are the same", "none", {"choices": ["none", "lookup"]}),
    )

    @classmethod
    def check(cls, known: argparse.Namespace, overrides: Sequence[str]) -> None:
        """Raise `ConfigError` for settings of generation that don't go together."""
        _generation(known, 1)

    @classmethod
    def measure(cls, known: argparse.Namespace, overrides: Sequence[str]) -> Outcome:
        """Measure the run, whose validation examples are used without --path."""
        model, tokenizer, config = load_model(known.checkpoint)
        architecture = config.model.architecture
        require(
            MODELS[architecture].reads_source,
            f"{known.checkpoint} is a {architecture}, and --task summarize is for models that read a source",
        )
        config = dataclasses.replace(config, mesh=MeshConfig())
        if known.path:
            table = ["--config.data.source=table", f"--config.data.test_path={tuple(known.path)!r}"]
            overrides = [*table, *overrides]
        config = apply_overrides(config, overrides)
        data = config.data
        pairs = open_pairs(data, "test" if known.path else "")
        chosen = validation_sample(pairs, known.limit or len(pairs))
        generation = _generation(known, data.target_length)
        generator = TextGenerator(model, tokenizer, generation)
        rows = written(generator, chosen.first, data.prefix, data.sequence_length)
        texts, references = [row.text for row in rows], list(chosen.second or ())
        values, tokens = text_measures(texts, references, data), sum(row.tokens for row in rows)
        values["tokens_per_step"] = tokens / sum(row.steps for row in rows)
        told = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
        lines = [
            {"source": source, "reference": reference, "text": text}
            for source, reference, text in zip(chosen.first, references, texts, strict=True)
        ]
        record = {"examples": len(lines), "file": chosen.name, **values, "checkpoint": known.checkpoint}
        settings = {"generation": dataclasses.asdict(generation), "data": dataclasses.asdict(data)}
        dumped = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return Outcome(f"{len(lines)} examples of {chosen.name}: {told}", {**record, **settings}, {".jsonl": dumped})


def _generation(known: argparse.Namespace, longest: int) -> GenerateConfig:
    """Return the settings of generation; raise `ConfigError` for those that don't go together."""
    names = ("beams", "length_penalty", "draft")
    given = {name: getattr(known, name) for name in names if name in known}
    longest = getattr(known, "max_new_tokens", None) or longest
    return GenerateConfig(max_new_tokens=longest, batch_size=known.batch_size, **given)
