"""Every task that a setting can name."""

import inspect

import pytest

from lin_jax.experiment import Config, ConfigError, FinetuneConfig, MedusaConfig, MedusaFinetuneConfig, config_from_dict
from lin_jax.settings.command_line import apply_overrides
from lin_jax.settings.dictionaries import section_to_dict
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
    with pytest.raises(ConfigError, match='must be one of language_model, .*, but is "language_modle"'):
        Config(finetune=FinetuneConfig(objective="language_modle"))


@pytest.mark.parametrize("name", ["attention_transfer", "medusa"])
def test_a_task_that_changes_a_model_needs_one(name):
    with pytest.raises(ConfigError, match=f"finetune.checkpoint is empty, but objective={name} changes a model"):
        Config(finetune=TASKS[name].settings())


def test_a_run_of_before_tasks_had_their_own_settings_is_read():
    """Its settings hold those of Medusa heads, whatever it learned."""
    old = section_to_dict(Config())
    old["finetune"]["medusa"] = {"heads": 4, "layers": 1, "weight": 0.2, "tree_nodes": 64}
    assert config_from_dict(old) == Config()
    old["finetune"] |= {"objective": "medusa", "checkpoint": "x", "train": []}
    found = config_from_dict(old).finetune
    assert found == MedusaFinetuneConfig(checkpoint="x", train=(), medusa=MedusaConfig(heads=4))


def test_the_command_line_chooses_a_task_and_its_settings():
    given = ["finetune.checkpoint=x", "finetune.objective=medusa", "finetune.train=", "finetune.medusa.heads=3"]
    config = apply_overrides(Config(), [f"--config.{text}" for text in given])
    assert config.finetune == MedusaFinetuneConfig(checkpoint="x", train=(), medusa=MedusaConfig(heads=3))
    back = apply_overrides(config, ["--config.finetune.objective=language_model", "--config.finetune.train=all"])
    assert back.finetune == FinetuneConfig(checkpoint="x")
    with pytest.raises(ConfigError, match="config.finetune.medusa is a setting of objective=medusa"):
        apply_overrides(Config(), ["--config.finetune.medusa.heads=3"])


def test_settings_of_another_task_are_refused():
    with pytest.raises(ConfigError, match="finetune is a FinetuneConfig, but objective=medusa has its settings in a M"):
        Config(finetune=FinetuneConfig(checkpoint="x", objective="medusa"))
