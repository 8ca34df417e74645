"""What a run starts from, `finetune.checkpoint`: whether it is there, and whether it is the model that is meant."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from lin_jax.experiment import Config
from lin_jax.ops.checksums import checksums
from lin_jax.paths import check_remote
from lin_jax.settings.base import require
from lin_jax.settings.dictionaries import section_to_dict
from lin_jax.settings.finetune import FinetuneConfig
from lin_jax.tasks.registry import task_of


def check_base(path: str) -> None:
    """Raise `ConfigError` where there is no run at `path`, a value of `finetune.checkpoint`."""
    check_remote(path, "finetune.checkpoint")
    directory = epath.Path(path)
    require(directory.exists(), f"finetune.checkpoint: {path} does not exist")
    plain = (directory / "config.json").exists() and not (directory / "checkpoints").exists()
    convert = f"python convert_weights.py --input {path} --output RUN"
    require(not plain, f"finetune.checkpoint: {path} is not a run of lin_jax; convert it first: {convert}")


def require_same_model(base: Config, config: Config) -> None:
    """Raise `ConfigError` naming the first setting of the model that another attention does not explain."""
    old, new = section_to_dict(base.model), section_to_dict(config.model)
    for name, value in new.items():
        require(
            name in config.model.free or old.get(name) == value,
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
