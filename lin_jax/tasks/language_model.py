"""Language modelling: predict the next token."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lin_jax.data.pipeline import validation_bytes_per_token
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.layers.parameter import Path
from lin_jax.layers.partition import Partition
from lin_jax.models.flops import Flops, training_flops
from lin_jax.models.structure import Structure
from lin_jax.tasks.base import Batch, Evaluation, Loss, RunSettings
from lin_jax.tasks.loss import LossSums
from lin_jax.tasks.text import TextTask


class LanguageModelling(TextTask):
    """Cross-entropy of the next tokens, measured in nats per token, perplexity and bits per byte."""

    def __init__(self, config: RunSettings):
        super().__init__(config)
        self._bytes_per_token: float | None = None

    def loss(self, structure: Structure, partition: Partition) -> Loss:
        """Return the cross-entropy with the z-loss of the settings."""
        return self._cross_entropy(structure, partition, self.config.optimizer.z_loss)

    def evaluation(self, structure: Structure, partition: Partition) -> Evaluation:
        """Return the cross-entropy alone."""
        loss = self._cross_entropy(structure, partition, 0.0)
        return lambda trained, frozen, constants, batch: loss(trained, frozen, constants, batch, None)

    def _cross_entropy(self, structure: Structure, partition: Partition, z_loss: float) -> Loss:
        def loss(trained: Any, frozen: Any, constants: Any, batch: Batch, key: jax.Array | None) -> LossSums:
            model = structure.model(trained, frozen, constants, partition)
            features_BTC = self.features(model, batch, partition, key)
            return self.next_token_loss(model, features_BTC, batch, partition, z_loss=z_loss)

        return loss

    def flops(self, trains: Callable[[Path], bool], *, tiled: bool) -> Flops:
        """Return the operations of the model and its adapters."""
        config = self.config
        return training_flops(config.model, config.data.sequence_length, config.finetune.lora, trains, tiled=tiled)

    def values(self, sums: Any, tokenizer: Tokenizer) -> dict[str, float]:
        """Return validation_loss, perplexity and bits_per_byte."""
        if self._bytes_per_token is None:
            self._bytes_per_token = validation_bytes_per_token(self.config.data, tokenizer)
        return text_values(float(sums.nll), float(sums.weight), float(sums.weight) * self._bytes_per_token)

    def describe(self, values: Mapping[str, float]) -> str:
        """Return a line about the text."""
        return (
            f"validation loss {values['validation_loss']:.4f}, perplexity {values['perplexity']:.3f}, "
            f"bits-per-byte {values['bits_per_byte']:.4f}"
        )


def text_values(nll: float, tokens: float, byte_count: float) -> dict[str, float]:
    """Return measures of a text from its summed negative log-likelihood in nats, its tokens and its bytes."""
    loss = nll / tokens if tokens else math.nan
    return {
        "validation_loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nll / math.log(2) / byte_count if byte_count else math.nan,
    }
