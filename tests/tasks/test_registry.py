"""Every task that a setting can name."""

import inspect

import pytest

from lin_jax.experiment import Config, ConfigError, FinetuneConfig
from lin_jax.tasks.base import Task
from lin_jax.tasks.registry import TASKS, task_of


def test_every_task_is_a_task_with_a_docstring_and_no_abstract_method():
    assert {"language_model", "attention_transfer", "medusa"} <= set(TASKS)
    for name in TASKS:
        assert issubclass(TASKS[name], Task) and not inspect.isabstract(TASKS[name])
        assert TASKS[name].__doc__ and TASKS[name].__module__.startswith("lin_jax.tasks.")


def test_the_default_is_to_predict_the_next_token():
    assert type(task_of(Config())) is TASKS["language_model"]


def test_a_name_that_there_is_not_is_told():
    with pytest.raises(ConfigError, match="unknown objective 'language_modle'; did you mean language_model?"):
        Config(finetune=FinetuneConfig(objective="language_modle"))


@pytest.mark.parametrize("name", ["attention_transfer", "medusa"])
def test_a_task_that_changes_a_model_needs_one(name):
    with pytest.raises(ConfigError, match=f"finetune.checkpoint is empty, but objective={name} changes a model"):
        Config(finetune=FinetuneConfig(objective=name))
