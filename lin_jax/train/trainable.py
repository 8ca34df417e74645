"""Which parameters train, and the model that a run trains: with its adapters and heads, frozen parts apart."""

import functools
from collections.abc import Callable

from flax import nnx

from lin_jax.experiment import Config
from lin_jax.layers.lora import ADAPTER, add_lora
from lin_jax.models.flops import Flops, training_flops
from lin_jax.models.medusa import HEADS, MedusaHeads
from lin_jax.models.registry import create_model
from lin_jax.models.structure import Path, Structure, make_structure
from lin_jax.settings.finetune import FinetuneConfig

# Parameters that linearized attention has and softmax attention does not.
NEW = ("alpha", "filter", "local_factor")

# Groups of `finetune.train`: whether a parameter belongs to one, by the parts of its path.
GROUPS: dict[str, Callable[[Path], bool]] = {
    "all": lambda path: True,
    "new": lambda path: path[-1] in NEW,
    "norm": lambda path: any(part.endswith("norm") for part in path),
    "embedding": lambda path: path[0].endswith("embedding"),
    "attention": lambda path: bool({"attention", "query_key_value", "mixing"} & set(path)) or "output" in path,
    "feed_forward": lambda path: bool({"feed_forward", "up", "down"} & set(path)),
    "head": lambda path: path[0] in ("logits", "score"),
}


def trains(finetune: FinetuneConfig, path: Path) -> bool:
    """Whether the parameter at `path` trains: adapters and Medusa heads always do."""
    return ADAPTER in path or path[0] == HEADS or any(GROUPS[group](path) for group in finetune.train)


def step_flops(config: Config, *, tiled: bool = False) -> Flops:
    """Operations for one token of the step that a run of `config` makes; `tiled`: see `training_flops`."""
    finetune, length = config.finetune, config.data.sequence_length
    return training_flops(config.model, length, finetune, functools.partial(trains, finetune), tiled=tiled)


def structure_of(config: Config) -> Structure:
    """The model that a run of `config` trains."""

    def create(rngs: nnx.Rngs) -> nnx.Module:
        model = create_model(config.model, rngs)
        add_lora(model, config.finetune.lora, rngs)
        if config.finetune.objective == "medusa":
            shape = (config.model.width, config.model.vocabulary_size)
            model.medusa = MedusaHeads(config.finetune.medusa, *shape, rngs=rngs)
        return model

    return make_structure(
        create,
        functools.partial(trains, config.finetune),
        frozen_dtype=config.finetune.frozen_dtype,
        keeps_start=config.finetune.objective == "attention_transfer",
    )
