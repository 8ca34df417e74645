"""Masked language modelling (Devlin et al., 2018): some tokens of a text are hidden, and predicted where they stood."""

# Letters beyond the legend: U = tokens of a row that are predicted.

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lin_jax.data.pipeline import training_batches, validation_batches
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.layers.parameter import Path
from lin_jax.layers.partition import Partition
from lin_jax.models.base import Model
from lin_jax.models.flops import Flops, head_flops, layer_flops, reaches_layers
from lin_jax.models.structure import Structure
from lin_jax.settings.base import ConfigError, require, setting
from lin_jax.settings.data import DataConfig
from lin_jax.settings.finetune import FinetuneConfig
from lin_jax.tasks.base import Batch, BatchField, Evaluation, Loss, RunSettings
from lin_jax.tasks.loss import LossSums, head_of, sharded_loss, split_positions
from lin_jax.tasks.text import TextTask

# Of what is predicted, BERT hides most behind the mask, puts a random token in some places, and leaves the rest.
MASKED, REPLACED = 0.8, 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedFinetuneConfig(FinetuneConfig):
    """Tokens that are hidden in texts."""

    objective: Literal["masked_language_model"] = setting("masked_language_model", "what is learned")
    masked_part: float = setting(0.15, "part of the tokens that is predicted: 80% masked, 10% others, 10% as they are")
    whole_words: bool = setting(False, "choose words, of which all tokens are predicted")
    mask_token: str = setting("[MASK]", "the tokenizer's token that hides others")

    def _check(self) -> None:
        super()._check()
        require(0 < self.masked_part < 1, f"masked_part must lie between 0 and 1, but is {self.masked_part}")


class MaskedSums(NamedTuple):
    """Sums over predicted tokens in an evaluation."""

    nll: Float[Array, ""]
    weight: Float[Array, ""]
    hits: Float[Array, ""]


class MaskedLanguageModelling(TextTask):
    """Cross-entropy of the hidden tokens, measured in nats per hidden token, and by how many are guessed right.

    A row is the tokenizer's start of a text, tokens of the text in their order, and its end. What is hidden depends on
    the row and on `data.seed` alone, so that a resumed run hides the same.
    """

    settings = MaskedFinetuneConfig
    adds = ("masked_head",)
    unit = "masked_tokens"

    @classmethod
    def suits(cls, model: type[Model]) -> bool:
        """Return whether a model has a head for masked tokens."""
        return model.predicts_masked

    @property
    def _own(self) -> MaskedFinetuneConfig:
        assert isinstance(self.config.finetune, MaskedFinetuneConfig)
        return self.config.finetune

    def check(self) -> None:
        """Raise `ConfigError` for rows that are too short, or hold several documents apart."""
        super().check()
        data = self.config.data
        require(data.packing == "concatenate", "data.packing=segments is not for masked_language_model")
        require(data.sequence_length > 3, f"data.sequence_length={data.sequence_length} is too short, give 4 or more")

    def complete(self) -> RunSettings:
        """Return the settings with the head of masked tokens."""
        config: Any = super().complete()
        return dataclasses.replace(config, model=dataclasses.replace(config.model, masked_head=True))

    def planned(self) -> RunSettings:
        """Return the same, which needs no data."""
        return self.complete()

    # What a batch holds.

    @property
    def predicted(self) -> int:
        """Return the tokens of a row that are predicted."""
        return max(1, round(self._own.masked_part * self.config.data.sequence_length))

    def batch_fields(self) -> Mapping[str, BatchField]:
        """Return tokens and segment ids [B, T], and positions, targets and weights of what is predicted [B, U]."""
        data = self.config.data
        row, chosen = (data.batch_size, data.sequence_length), (data.batch_size, self.predicted)
        found = {name: BatchField(row, ("batch", "tokens"), np.int32) for name in ("tokens", "segment_ids")}
        found |= {name: BatchField(chosen, ("batch", None), np.int32) for name in ("positions", "targets")}
        return found | {"weights": BatchField(chosen, ("batch", None), np.float32)}

    def training_batches(self, tokenizer: Tokenizer, rows: Sequence[int] | np.ndarray) -> grain.DatasetIterator:
        """Return batches of the training split."""
        return training_batches(self._text, tokenizer, rows, self._hiding(tokenizer))

    def validation_batches(
        self, name: str, tokenizer: Tokenizer, rows: Sequence[int] | np.ndarray
    ) -> grain.DatasetIterator:
        """Return batches of the validation split."""
        return validation_batches(self._text, tokenizer, rows, self._hiding(tokenizer))

    @property
    def _text(self) -> DataConfig:
        """Return the settings of the text of rows, which have room for two tokens more."""
        data = self.config.data
        return dataclasses.replace(data, sequence_length=data.sequence_length - 2)

    def _hiding(self, tokenizer: Tokenizer) -> Callable[[grain.IterDataset], grain.IterDataset]:
        masking = Masking(tokenizer, self._own, self.predicted, self.config.data.seed)
        return lambda rows: rows.map(masking)

    def check_data(self, tokenizer: Tokenizer) -> str:
        """Return the fingerprint of the text; raise `ConfigError` where it, or the tokenizer, cannot be used."""
        Masking(tokenizer, self._own, self.predicted, self.config.data.seed)
        return super().check_data(tokenizer)

    # What is learned.

    def loss(self, structure: Structure, partition: Partition) -> Loss:
        """Return the cross-entropy."""

        def loss(trained: Any, frozen: Any, constants: Any, batch: Batch, key: Array | None) -> LossSums:
            model = structure.model(trained, frozen, constants, partition)
            return self._sums(model, batch, partition, key, self.config.optimizer.z_loss)

        return loss

    def _sums(self, model: Any, batch: Batch, partition: Partition, key: Array | None, z_loss: float) -> LossSums:
        head, used = head_of(model)
        hidden, targets = self._hidden(model, batch, partition, key), (batch["targets"], batch["weights"])
        chunk = max(1, self.config.train.loss_chunk * partition.shards("batch") // len(hidden))
        return sharded_loss(head, used, hidden, *targets, chunk=chunk, z_loss=z_loss, partition=partition)

    def _hidden(
        self, model: Any, batch: Batch, partition: Partition, key: Array | None = None
    ) -> Float[Array, "B U C"]:
        """Return the features of what is predicted."""
        dropout = {} if key is None else {"dropout_key": key}
        features_BTC = model.features(batch["tokens"], batch["segment_ids"], partition, **dropout)
        return jnp.take_along_axis(features_BTC, batch["positions"][:, :, None], axis=1)

    def flops(self, trains: Callable[[Path], bool], *, tiled: bool) -> Flops:
        """Return the operations for one token of a row: the layers, and its part of the head."""
        config, T = self.config, self.config.data.sequence_length
        lora = config.finetune.lora
        layers = layer_flops(config.model, T, lora, trains, tiled=tiled)
        head = head_flops(config.model, trains, reaches_layers(config.model, lora, trains))
        return layers + (self.predicted * head) // T

    # What is measured.

    def evaluation(self, structure: Structure, partition: Partition) -> Evaluation:
        """Return the function that gives `MaskedSums`."""

        def evaluate(trained: Any, frozen: Any, constants: Any, batch: Batch) -> MaskedSums:
            model = structure.model(trained, frozen, constants, partition)
            sums = self._sums(model, batch, partition, None, 0.0)
            head, used = head_of(model)

            def add(hits: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
                hidden, targets, weights = part
                return hits + jnp.sum((jnp.argmax(head(used, hidden), axis=-1) == targets) * weights), None

            arrays = self._hidden(model, batch, partition), batch["targets"], batch["weights"]
            chunk = max(1, self.config.train.loss_chunk // len(arrays[0]))
            parts = tuple(split_positions(array, chunk) for array in arrays)
            return MaskedSums(sums.nll, sums.weight, jax.lax.scan(add, jnp.zeros(()), parts)[0])

        return evaluate

    def values(self, sums: Any, tokenizer: Tokenizer) -> dict[str, float]:
        """Return validation_loss, in nats per hidden token, and accuracy."""
        weight = max(float(sums.weight), 1.0)
        return {"validation_loss": float(sums.nll) / weight, "accuracy": float(sums.hits) / weight}

    def describe(self, values: Mapping[str, float]) -> str:
        """Return a line of both."""
        return (
            f"validation loss {values['validation_loss']:.4f}, {values['accuracy']:.1%} of masked tokens guessed right"
        )


class Masking:
    """Hides tokens of rows."""

    def __init__(self, tokenizer: Tokenizer, config: MaskedFinetuneConfig, predicted: int, seed: int):
        """Check the tokenizer.

        Raises:
            ConfigError: it has no token that hides others, or does not tell where words begin.
        """
        mask = tokenizer.token_id(config.mask_token)
        if mask is None:
            raise ConfigError(
                f"the tokenizer has no token {config.mask_token!r}: set finetune.mask_token to the one that masks"
            )
        self._tokenizer, self._mask, self._predicted, self._seed = tokenizer, mask, predicted, seed
        self._begins_V = tokenizer.word_beginnings() if config.whole_words else None
        self._special = np.array([tokenizer.start_id, tokenizer.end_id, mask])

    def __call__(self, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return tokens, segment ids, positions, targets and weights, of a row of text."""
        text = row["targets"][row["segment_ids"] > 0]
        T = len(row["targets"]) + 2
        tokens, ids = np.zeros(T, np.int32), np.zeros(T, np.int32)
        whole = np.concatenate([[self._tokenizer.start_id], text, [self._tokenizer.end_id]])
        if len(text):
            tokens[: len(whole)], ids[: len(whole)] = whole, 1
        # No state to keep: the same row is always masked alike, and rows begin elsewhere in each epoch.
        random = np.random.default_rng((self._seed, zlib.crc32(tokens.tobytes())))
        chosen = self._choose(tokens, ids, random)
        found = {"positions": np.zeros(self._predicted, np.int32), "targets": np.zeros(self._predicted, np.int32)}
        found["positions"][: len(chosen)], found["targets"][: len(chosen)] = chosen, tokens[chosen]
        weights = (np.arange(self._predicted) < len(chosen)).astype(np.float32)
        how = random.random(len(chosen))
        others = random.integers(0, self._tokenizer.vocabulary_size, len(chosen))
        tokens[chosen[how < MASKED]] = self._mask
        replaced = (how >= MASKED) & (how < MASKED + REPLACED)
        tokens[chosen[replaced]] = others[replaced]
        return {"tokens": tokens, "segment_ids": ids, "weights": weights, **found}

    def _choose(self, tokens: np.ndarray, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Return the places of what is predicted, in their order: words or tokens at random."""
        places = np.flatnonzero((ids > 0) & ~np.isin(tokens, self._special))
        if not len(places):
            return places
        begins = np.ones(len(places), bool) if self._begins_V is None else self._begins_V[tokens[places]].copy()
        # What stands behind something that may not be chosen begins a word too.
        begins |= np.diff(places, prepend=places[0] - 2) > 1
        words = np.split(places, np.flatnonzero(begins)[1:])
        wanted = min(self._predicted, max(1, round(len(places) * self._predicted / len(tokens))))
        chosen: list[int] = []
        for word in random.permutation(len(words)):
            if len(chosen) + len(words[word]) <= wanted:
                chosen += words[word].tolist()
        return np.array(sorted(chosen), np.int64)
