"""The tasks that there are, by the name that `finetune.objective` gives them."""

from lin_jax.settings.registry import Registry
from lin_jax.tasks.base import RunSettings, Task

TASKS: Registry[type[Task]] = Registry(
    "objective",
    "objective",
    {
        "language_model": "lin_jax.tasks.language_model:LanguageModelling",
        "attention_transfer": "lin_jax.tasks.transfer:AttentionTransfer",
        "masked_language_model": "lin_jax.tasks.masked:MaskedLanguageModelling",
        "classification": "lin_jax.tasks.classification:Classification",
        "medusa": "lin_jax.tasks.medusa:MedusaTraining",
        "seq2seq": "lin_jax.tasks.seq2seq:SequenceToSequence",
    },
)


def task_of(config: RunSettings) -> Task:
    """Return the task of a run; raise `ConfigError` where there is none of that name."""
    return TASKS[config.finetune.objective](config)
