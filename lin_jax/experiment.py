"""An experiment: all settings of a run, in one frozen dataclass."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lin_jax.attentions.augmented import AugmentedConfig as AugmentedConfig
from lin_jax.attentions.base import AttentionConfig as AttentionConfig
from lin_jax.attentions.longlora import LongloraConfig as LongloraConfig
from lin_jax.attentions.quadratic import QuadraticConfig as QuadraticConfig
from lin_jax.attentions.registry import preset_attention as preset_attention
from lin_jax.attentions.released_t5 import ReleasedT5Config as ReleasedT5Config
from lin_jax.attentions.softmax import SoftmaxConfig as SoftmaxConfig
from lin_jax.chips import is_plan
from lin_jax.layers.rope import RopeConfig as RopeConfig
from lin_jax.models.base import ModelConfig as ModelConfig
from lin_jax.models.bert import BertConfig as BertConfig
from lin_jax.models.flash import FlashConfig as FlashConfig
from lin_jax.models.gpt2 import Gpt2Config as Gpt2Config
from lin_jax.models.llama import LlamaConfig as LlamaConfig
from lin_jax.models.registry import MODELS
from lin_jax.models.t5 import T5Config as T5Config
from lin_jax.settings.base import ConfigError as ConfigError
from lin_jax.settings.base import require, require_paths, section, setting, variants
from lin_jax.settings.checkpoint import CheckpointConfig as CheckpointConfig
from lin_jax.settings.command_line import OneLineParser, apply_overrides, describe
from lin_jax.settings.config_file import call_get_config
from lin_jax.settings.data import DataConfig as DataConfig
from lin_jax.settings.dictionaries import section_from_dict
from lin_jax.settings.distributed import DistributedConfig as DistributedConfig
from lin_jax.settings.finetune import FinetuneConfig as FinetuneConfig
from lin_jax.settings.finetune import LoraConfig as LoraConfig
from lin_jax.settings.finetune import TrainedGroup as TrainedGroup
from lin_jax.settings.generate import GenerateConfig as GenerateConfig
from lin_jax.settings.generate import SamplingConfig as SamplingConfig
from lin_jax.settings.medusa import MedusaConfig as MedusaConfig
from lin_jax.settings.mesh import MeshConfig as MeshConfig
from lin_jax.settings.optimizer import OptimizerConfig as OptimizerConfig
from lin_jax.settings.train import TrainConfig as TrainConfig
from lin_jax.settings.typed import Settings, shown
from lin_jax.tasks.classification import ClassificationFinetuneConfig as ClassificationFinetuneConfig
from lin_jax.tasks.masked import MaskedFinetuneConfig as MaskedFinetuneConfig
from lin_jax.tasks.medusa import MedusaFinetuneConfig as MedusaFinetuneConfig
from lin_jax.tasks.registry import TASKS, task_of
from lin_jax.tasks.seq2seq import Seq2seqFinetuneConfig as Seq2seqFinetuneConfig
from lin_jax.tasks.transfer import TransferFinetuneConfig as TransferFinetuneConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """An experiment: everything that `train.py` needs to know."""

    workdir: str = setting(
        "runs/experiment", "directory of checkpoints, metrics, pictures, also gs://BUCKET/DIR; a rerun resumes from it"
    )
    model: ModelConfig = variants(FlashConfig, MODELS, "the model")
    data: DataConfig = section(DataConfig, "the text")
    optimizer: OptimizerConfig = section(OptimizerConfig, "the optimizer")
    train: TrainConfig = section(TrainConfig, "the training loop")
    finetune: FinetuneConfig = variants(
        FinetuneConfig, TASKS, "what is learned, from which model, and what of it is trained"
    )
    checkpoint: CheckpointConfig = section(CheckpointConfig, "checkpoints")
    mesh: MeshConfig = section(MeshConfig, "devices")
    distributed: DistributedConfig = section(DistributedConfig, "the processes of a run on several hosts")
    profile: bool = setting(False, "write a profiler trace of a few steps to workdir/profile")
    show_sharding: bool = setting(False, "print every parameter with its shards and bytes a device, and stop")
    plan: str = setting(
        "",
        "devices, which need not be there, to compile the training step for without any parameters; prints memory, "
        "exchanges and best possible times, and stops: v4, v5e, v5p, v6e with a topology (v5e:8x8, v5p:4x4x4; two "
        "slices: 2*v5e:8x8), a100, a100-40g, h100, h200 with a number (h100:8), or cpu:8",
    )

    def _check(self) -> None:
        require_paths(self, "workdir")
        require(bool(self.workdir), "workdir is empty: give a directory")
        objective = self.finetune.objective
        require(
            objective in TASKS,
            f"finetune.objective must be one of {', '.join(TASKS)}, but is {shown(objective)}",
        )
        require(
            not self.plan or is_plan(self.plan),
            f"plan must look like cpu:8, h100:8, v5e:8x8, v5p:4x4x4 or 2*v5e:8x8, but is {self.plan}",
        )
        if self.data.packing == "segments":
            self.model.check_segments()
        require(
            self.data.batch_size % self.train.microbatches == 0,
            f"data.batch_size={self.data.batch_size} is not divisible by train.microbatches={self.train.microbatches}",
        )
        require(
            self.data.tokenizer != "checkpoint" or bool(self.finetune.checkpoint),
            "data.tokenizer=checkpoint needs finetune.checkpoint",
        )
        task_of(self).check()
        limit = self.model.row_limit
        require(
            limit is None or self.data.sequence_length <= limit,
            f"data.sequence_length={self.data.sequence_length} is more than the model's positions={limit}",
        )
        require(
            self.optimizer.warmup_steps < self.train.steps
            or self.optimizer.schedule == "constant"
            or self.train.epochs > 0,
            f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be smaller than train.steps={self.train.steps}",
        )


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Return the settings of a Python file, with those of the command line.

    Args:
        path: a file with a `get_config()` that returns a `Config`; `file.py:text` calls `get_config("text")`.
        overrides: see `apply_overrides`.

    Raises:
        ConfigError: the file, a field or a value is wrong; the message names it.
    """
    config = call_get_config(path)
    require(
        isinstance(config, Config), f"get_config() of {path} must return a Config, but gives {type(config).__name__}"
    )
    return apply_overrides(config, overrides)


def config_from_dict(values: Any) -> Config:
    """Return the settings of a run as `section_to_dict` saved them, also by an earlier version; raise `ConfigError`."""
    return section_from_dict(values, Config, "config")


def config_parser(description: str | None) -> OneLineParser:
    """Return a parser with `--config`, whose `--help` lists every setting."""
    parser = OneLineParser(
        description, epilog="settings, with their defaults before the file is read:\n\n" + describe(Config())
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:TEXT]", help="Python file with get_config(); TEXT is its argument"
    )
    return parser
