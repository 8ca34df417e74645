"""Tasks that learn from rows of text: where their batches come from, and what a model makes of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Array, Float

from lin_jax.data.checks import check_data
from lin_jax.data.pipeline import training_batches, validation_batches
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.layers.partition import Partition
from lin_jax.models.base import Decoder, Model
from lin_jax.models.registry import MODELS
from lin_jax.settings.base import require
from lin_jax.tasks.base import Batch, BatchField, RunSettings, Task
from lin_jax.tasks.loss import LossSums, head_of, sharded_loss

_TYPES = {"tokens": np.int32, "targets": np.int32, "segment_ids": np.int32, "weights": np.float32}


class TextTask(Task):
    """A task whose batches hold rows of text: tokens, the next tokens, segment ids and weights, [B, T] each.

    See `lin_jax.data.pipeline.training_batches`. A task with more fields gives them in `batch_fields` and makes them in
    `make_rows`.
    """

    def complete(self) -> RunSettings:
        """Return the settings; raise `ConfigError` for a model that the task is not for.

        Not in `check`: settings of a model alone, which is converted for example, name no other task.
        """
        architecture, objective = self.config.model.architecture, self.config.finetune.objective
        can = [name for name in MODELS if self.suits(MODELS[name])]
        require(
            architecture in can,
            f"finetune.objective={objective} cannot be done by {architecture}; models that can: {', '.join(can)}",
        )
        return super().complete()

    @classmethod
    def suits(cls, model: type[Model]) -> bool:
        """Return whether the task is one for a kind of model: for those that predict the next token of a row."""
        return issubclass(model, Decoder) and not model.reads_source

    def batch_fields(self) -> Mapping[str, BatchField]:
        """Return tokens, targets, segment ids and weights."""
        data = self.config.data
        shape = (data.batch_size, data.sequence_length)
        return {name: BatchField(shape, ("batch", "tokens"), kind) for name, kind in _TYPES.items()}

    def make_rows(self, rows: grain.IterDataset) -> grain.IterDataset:
        """Return what is batched, of rows of text: dictionaries of arrays [T]."""
        return rows

    def check_data(self, tokenizer: Tokenizer) -> str:
        """Return the fingerprint of the training text; raise `ConfigError` where it cannot be had."""
        return check_data(self.config.data, self.config.model.vocabulary_size, tokenizer)

    def training_batches(self, tokenizer: Tokenizer, rows: Sequence[int] | np.ndarray) -> grain.DatasetIterator:
        """Return batches of the training split."""
        return training_batches(self.config.data, tokenizer, rows, self.make_rows)

    def validation_batches(
        self, name: str, tokenizer: Tokenizer, rows: Sequence[int] | np.ndarray
    ) -> grain.DatasetIterator:
        """Return batches of the validation split."""
        return validation_batches(self.config.data, tokenizer, rows, self.make_rows)

    def segment_ids(self, batch: Batch) -> Array | None:
        """Return the batch's segment ids; None where rows are single sequences, so that models leave out masks."""
        return batch["segment_ids"] if self.config.data.packing == "segments" else None

    def features(
        self, model: Any, batch: Batch, partition: Partition, key: Array | None = None
    ) -> Float[Array, "B T C"]:
        """Return what the model's head reads of a batch; `key` is that of dropout, which few models have."""
        dropout = {} if key is None else {"dropout_key": key}
        features_BTC = model.features(batch["tokens"], self.segment_ids(batch), partition, **dropout)
        return partition.constrain(features_BTC, "batch", "tokens", None)

    def next_token_loss(
        self, model: Any, features_BTC: Float[Array, "B T C"], batch: Batch, partition: Partition, *, z_loss: float
    ) -> LossSums:
        """Return the cross-entropy of the next tokens, given what `features` gives."""
        head, used = head_of(model, self.teachers)
        return sharded_loss(
            head,
            used,
            features_BTC,
            batch["targets"],
            batch["weights"],
            chunk=self.loss_chunk(batch, partition),
            z_loss=z_loss,
            partition=partition,
        )

    def loss_chunk(self, batch: Batch, partition: Partition) -> int:
        """Return the tokens of a row whose logits are in memory at a time, on all devices that share it."""
        own = self.config.train.loss_chunk
        return max(1, own * partition.shards("batch", "tokens") // batch["tokens"].shape[0])
