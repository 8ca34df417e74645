"""Settings of a model to start from, and of what of it is trained."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from lin_jax.settings.base import require, require_at_least_zero, require_paths, require_positive, section, setting
from lin_jax.settings.typed import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Settings):
    """Low-rank adapters (Hu et al., 2021): a product of two thin matrices added to a frozen one."""

    rank: int = setting(0, "rank of the added matrices; 0: no adapters", most=2**16)
    alpha: float = setting(16.0, "the added matrix is scaled by alpha / rank")
    targets: tuple[str, ...] = setting(
        ("query", "key", "value", "output"),
        "projections that get adapters, by name; GPT-2's are query_key_value, output, up, down",
    )

    def _check(self) -> None:
        require_at_least_zero(self, "rank")
        require_positive(self, "alpha")
        require(bool(self.targets) or self.rank == 0, "targets is empty: name projections, or set rank to 0")


TrainedGroup = Literal["all", "new", "norm", "embedding", "attention", "feed_forward", "head"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Settings):
    """Predict the next token, from random parameters or those of a model, and say which of them change.

    Tasks with settings of their own have them in a subclass.
    """

    # Every run had the settings of Medusa heads once, also one that trained none.
    former: ClassVar[Mapping[str, str | None]] = {"medusa": None}

    checkpoint: str = setting(
        "",
        "what to start from: a run of lin_jax, also one that convert_weights.py wrote, or a Hugging Face directory; "
        "empty: random parameters",
    )
    settings: Literal["config", "checkpoint"] = setting(
        "config",
        "where the model's settings are from; those of checkpoint leave attention, dtype, remat and dropout to config",
    )
    train: tuple[TrainedGroup, ...] = setting(
        ("all",),
        "what trains besides adapters: all, or some of new (what linearized attention adds), norm, embedding, "
        "attention (with its projections), feed_forward, head; the rest is frozen",
    )
    lora: LoraConfig = section(LoraConfig, "low-rank adapters")
    frozen_dtype: Literal["float32", "bfloat16"] = setting("float32", "type in which frozen parameters are held")
    objective: str = setting("language_model", "what is learned")

    def _check(self) -> None:
        require_paths(self, "checkpoint")
        require(
            self.lora.rank == 0 or "all" not in self.train,
            "train=all leaves nothing for adapters: say what trains besides them, such as new,norm,embedding",
        )
        require(self.settings == "config" or bool(self.checkpoint), "settings=checkpoint needs finetune.checkpoint")
        if not self.checkpoint:
            plain = self.train == ("all",) and self.lora.rank == 0
            require(plain, "checkpoint is empty, but random parameters must all train: give the run to start from")

    @property
    def trains_model(self) -> bool:
        """Whether anything of the model itself trains, or adapters do."""
        return bool(self.train) or self.lora.rank > 0
