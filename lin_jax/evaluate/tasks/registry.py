"""The tasks of `eval.py`, by the name that `--task` gives them."""

from lin_jax.evaluate.tasks.base import EvaluationTask
from lin_jax.settings.registry import Registry

EVALUATIONS: Registry[type[EvaluationTask]] = Registry(
    "task",
    "task",
    {
        "classification": "lin_jax.evaluate.tasks.classification:ClassificationTask",
        "perplexity": "lin_jax.evaluate.tasks.perplexity:PerplexityTask",
        "speculative": "lin_jax.evaluate.tasks.speculative:SpeculativeTask",
        "summarize": "lin_jax.evaluate.tasks.summarize:SummarizeTask",
    },
)
