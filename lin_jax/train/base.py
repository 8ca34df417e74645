"""What a run starts from, `finetune.checkpoint`: whether it is there, and whether it is the model that is meant."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from lin_jax.data.tokenizers import Tokenizer, load_tokenizer, restore_tokenizer
from lin_jax.experiment import Config
from lin_jax.models.base import ModelConfig
from lin_jax.ops.checksums import checksums
from lin_jax.paths import check_remote, write_whole
from lin_jax.settings.base import require
from lin_jax.settings.data import DataConfig
from lin_jax.settings.dictionaries import section_to_dict
from lin_jax.settings.finetune import FinetuneConfig
from lin_jax.tasks.registry import task_of
from lin_jax.train.workdir import KEPT_TOKENIZER, is_run, read_settings, tokenizer_directory, workdir_and_step

# What reads other forms of models, a layer that imports this one: named, as models name their conversions.
_FOREIGN = "lin_jax.convert.as_base"


def check_base(path: str) -> None:
    """Raise `ConfigError` where there is nothing at `path`, a value of `finetune.checkpoint`."""
    check_remote(path, "finetune.checkpoint")
    require(epath.Path(path).exists(), f"finetune.checkpoint: {path} does not exist")


def is_foreign(path: str) -> bool:
    """Return whether `path` is a Hugging Face directory, not a run."""
    return not is_run(path) and (epath.Path(path) / "config.json").exists()


def load_foreign(path: str, mesh: Mesh) -> tuple[Any, Config]:
    """Return the model of a Hugging Face directory, and settings of which only the model's mean something."""
    model, config = importlib.import_module(_FOREIGN).load_base(path, mesh)
    return model, Config(model=config, data=DataConfig(sequence_length=1))  # Any model can read so much.


def base_tokenizer(path: str) -> Tokenizer:
    """Return the tokenizer of a model to start from."""
    check_base(path)
    if is_foreign(path):
        return load_tokenizer(DataConfig(tokenizer=path), path)
    return restore_tokenizer(tokenizer_directory(workdir_and_step(path)[0]))


def keep_tokenizer_files(config: Config) -> None:
    """Copy the files of the base model's tokenizer as they came from Hugging Face, chat template included."""
    path, target = config.finetune.checkpoint, tokenizer_directory(config.workdir) / KEPT_TOKENIZER
    if config.data.tokenizer != "checkpoint":
        return
    if is_foreign(path):
        importlib.import_module(_FOREIGN).keep_tokenizer(path, target)
        return
    kept = tokenizer_directory(workdir_and_step(path)[0]) / KEPT_TOKENIZER
    for file in kept.iterdir() if kept.is_dir() else ():
        write_whole(target / file.name, file.read_bytes())


def with_settings_of_base(config: Config) -> Config:
    """Return `config` with the model's settings of what it starts from, where `finetune.settings` says so.

    Attention and how a model is computed and trained stay as `config` says.
    """
    path, own = config.finetune.checkpoint, config.model
    if config.finetune.settings == "config":
        return config
    check_base(path)
    base: ModelConfig = (
        importlib.import_module(_FOREIGN).read_base_settings(path) if is_foreign(path) else read_settings(path).model
    )
    require(
        type(base) is type(own),
        f"finetune.checkpoint={path} is a {base.architecture}, but config.model is a {own.architecture}: "
        f"set --config.model={base.architecture}",
    )
    names = {field.name for field in dataclasses.fields(own)}
    kept = names & {*own.attention_fields, "dtype", "remat", "dropout"}
    return dataclasses.replace(config, model=dataclasses.replace(base, **{name: getattr(own, name) for name in kept}))


def require_same_model(base: Config, config: Config) -> None:
    """Raise `ConfigError` naming the first setting of the model that another attention does not explain."""
    old, new = section_to_dict(base.model), section_to_dict(config.model)
    free = {*config.model.free, *task_of(config).free_of(base.model), "dropout"}
    for name, value in new.items():
        require(
            name in free or old.get(name) == value,
            f"config.model.{name} is {value}, but the model in finetune.checkpoint={config.finetune.checkpoint} has "
            f"{old.get(name)}",
        )
    if task_of(config).keeps_attention:
        _require_same_attention(old["attention"], new["attention"], config.finetune)


def _require_same_attention(old: Mapping[str, Any], new: Mapping[str, Any], finetune: FinetuneConfig) -> None:
    """Raise `ConfigError` where a task would learn from features that the model does not have."""
    # Softmax attention has no settings of its own.
    for name, value in ({"kind": "softmax"} if new["kind"] == "softmax" else new).items():
        require(
            name == "implementation" or old.get(name) == value,
            f"config.model.attention.{name} is {value}, but the model in finetune.checkpoint={finetune.checkpoint} has "
            f"{old.get(name)}, which objective={finetune.objective} must not change",
        )


def require_same_frozen(frozen: Any, meta: Mapping[str, Any], config: Config) -> None:
    """Raise `ConfigError` unless `frozen` is what the run of a checkpoint with this `meta` did not train."""
    absent = task_of(config).teachers.keys() - frozen.keys()  # Only training has teachers.
    saved = meta["checksums"].get("frozen", {})
    saved = {name: value for name, value in saved.items() if name.partition(".")[0] not in absent}
    found, teachers = checksums(frozen), task_of(config).teachers
    for path in sorted(found.keys() | saved.keys()):
        top = path.partition(".")[0]
        what = f"teacher {teachers[top]}" if top in teachers else f"finetune.checkpoint={config.finetune.checkpoint}"
        require(
            found.get(path) == saved.get(path),
            f"the parameters in {what} are not those that the run in {config.workdir} was started from: put them "
            "back, or choose another --config.workdir",
        )
