"""Sequence to sequence: write a target from its source, such as the summary of an article."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lin_jax.data.checks import check_fits
from lin_jax.data.examples import TRAIN, Examples, glue_task, open_pairs, validation_names
from lin_jax.data.pairs import encode_sources, pair_batches
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.decode.text import Continuation, TextGenerator
from lin_jax.layers.parameter import Path
from lin_jax.layers.partition import Partition
from lin_jax.models.flops import Flops, head_flops, pair_flops, reaches_layers
from lin_jax.models.registry import MODELS
from lin_jax.models.structure import Structure
from lin_jax.settings.base import require, require_at_least_zero, setting
from lin_jax.settings.data import DataConfig
from lin_jax.settings.finetune import FinetuneConfig
from lin_jax.settings.generate import GenerateConfig
from lin_jax.tasks.base import Batch, BatchField, Evaluation, Loss, RunSettings, Task, Validation
from lin_jax.tasks.epochs import steps_of_epochs
from lin_jax.tasks.loss import LossSums, head_of, sharded_loss
from lin_jax.tasks.measures import class_measures, number_measures
from lin_jax.tasks.rouge import rouge


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2seqFinetuneConfig(FinetuneConfig):
    """Targets of sources, and how they are generated to be measured."""

    objective: Literal["seq2seq"] = setting("seq2seq", "what is learned")
    label_smoothing: float = setting(0.0, "part of the loss that is the mean over all tokens of the vocabulary")
    generated_examples: int = setting(
        200,
        "validation examples whose targets are generated at each evaluation, and measured: by ROUGE, and for "
        "data.source=glue by what GLUE measures; 0: none",
    )
    beams: int = setting(1, "of the search that generates them, see generate.py --beams", most=1024)
    length_penalty: float = setting(1.0, "of that search, see generate.py --length_penalty")

    def _check(self) -> None:
        super()._check()
        require(0 <= self.label_smoothing < 1, f"label_smoothing must lie in [0, 1), but is {self.label_smoothing}")
        require_at_least_zero(self, "generated_examples")
        require(self.beams > 0, f"beams must be greater than 0, but is {self.beams}")


class SequenceToSequence(Task):
    """Cross-entropy of the target's tokens, each predicted from the source and the target before it.

    Measured by the loss of all validation targets, and by what is generated of some.
    """

    settings = Seq2seqFinetuneConfig
    counts_examples = True

    def __init__(self, config: RunSettings):
        super().__init__(config)
        glue = glue_task(config.data)
        # A run has other settings until `check` has refused them.
        if getattr(config.finetune, "generated_examples", 0):
            self.best_by, self.higher_is_better = glue.measure if glue else "rougeLsum", True
        if glue:
            self.validation_sets = validation_names(config.data)

    @property
    def _own(self) -> Seq2seqFinetuneConfig:
        assert isinstance(self.config.finetune, Seq2seqFinetuneConfig)
        return self.config.finetune

    def check(self) -> None:
        """Raise `ConfigError` for models that read no source, and for data without pairs."""
        super().check()
        data, architecture = self.config.data, self.config.model.architecture
        can = [name for name in MODELS if MODELS[name].reads_source]
        require(
            MODELS[architecture].reads_source,
            f"finetune.objective=seq2seq cannot be done by {architecture}; models that can: {', '.join(can)}",
        )
        require(
            data.source in ("glue", "table", "tfds"),
            f"finetune.objective=seq2seq needs sources and targets, but data.source is {data.source}: give glue, "
            "table or tfds",
        )
        require(
            bool(data.target_field) or data.source == "glue",
            "data.target_field is empty: name the column of what is to be written",
        )

    def complete(self) -> RunSettings:
        """Return settings with the steps that `train.epochs` come to."""
        config: Any = self.config
        return dataclasses.replace(config, train=steps_of_epochs(config, len(open_pairs(config.data, TRAIN))))

    # The data.

    def batch_fields(self) -> Mapping[str, BatchField]:
        """Return the source with its padding, what the decoder reads and predicts, and weights."""
        data, of_rows = self.config.data, ("batch", None)
        source, target = (data.batch_size, data.sequence_length), (data.batch_size, data.target_length)
        found = {name: BatchField(source, of_rows, np.int32) for name in ("source", "source_ids")}
        found |= {name: BatchField(target, of_rows, np.int32) for name in ("tokens", "targets")}
        return found | {"weights": BatchField(target, of_rows, np.float32)}

    def check_data(self, tokenizer: Tokenizer) -> str:
        """Return the fingerprint of the training pairs; raise `ConfigError` where they cannot be had."""
        data = self.config.data
        check_fits(
            tokenizer.vocabulary_size,
            self.config.model.vocabulary_size,
            f"the vocabulary of data.tokenizer={data.tokenizer}",
        )
        for name in self.validation_sets:
            open_pairs(data, name)
        return open_pairs(data, TRAIN).fingerprint

    def _batches(self, split: str, tokenizer: Tokenizer, rows: Any, *, trains: bool) -> grain.DatasetIterator:
        data, model = self.config.data, self.config.model
        start: int = model.start_token  # type: ignore[attr-defined]
        return pair_batches(data, tokenizer, open_pairs(data, split), rows, start_token=start, trains=trains)

    def training_batches(self, tokenizer: Tokenizer, rows: Sequence[int] | np.ndarray) -> grain.DatasetIterator:
        """Return batches of the training split."""
        return self._batches(TRAIN, tokenizer, rows, trains=True)

    def validation_batches(
        self, name: str, tokenizer: Tokenizer, rows: Sequence[int] | np.ndarray
    ) -> grain.DatasetIterator:
        """Return batches of the validation split, each pair once."""
        return self._batches(name, tokenizer, rows, trains=False)

    def real_tokens(self, batch: Batch) -> tuple[Array, int]:
        """Return the tokens of sources and targets, and of all rows."""
        source = (batch["source_ids"] != 0) & jnp.any(batch["weights"] > 0, axis=1, keepdims=True)
        real = jnp.sum(source, dtype=jnp.int32) + jnp.sum(batch["weights"] > 0, dtype=jnp.int32)
        return real, source.size + batch["weights"].size

    # What is learned.

    def loss(self, structure: Structure, partition: Partition) -> Loss:
        """Return the cross-entropy, with the smoothing and the z-loss of the settings."""
        return self._cross_entropy(structure, partition, self.config.optimizer.z_loss, self._own.label_smoothing)

    def evaluation(self, structure: Structure, partition: Partition) -> Evaluation:
        """Return the cross-entropy alone."""
        loss = self._cross_entropy(structure, partition, 0.0, 0.0)
        return lambda trained, frozen, constants, batch: loss(trained, frozen, constants, batch, None)

    def _cross_entropy(self, structure: Structure, partition: Partition, z_loss: float, smoothing: float) -> Loss:
        def loss(trained: Any, frozen: Any, constants: Any, batch: Batch, key: Array | None) -> LossSums:
            model = structure.model(trained, frozen, constants, partition)
            features_BTC = pair_features(model, batch, partition, key)
            head, used = head_of(model)
            chunk = self.config.train.loss_chunk * partition.shards("batch") // features_BTC.shape[0]
            targets = batch["targets"], batch["weights"]
            options: dict[str, Any] = {"z_loss": z_loss, "smoothing": smoothing, "partition": partition}
            return sharded_loss(head, used, features_BTC, *targets, chunk=max(1, chunk), **options)

        return loss

    @property
    def row_tokens(self) -> int:
        """Return the tokens of a target, by which speed is measured."""
        return self.config.data.target_length

    def flops(self, trains: Callable[[Path], bool], *, tiled: bool) -> Flops:
        """Return the operations for one token of a target, with its part of the source."""
        config, data = self.config, self.config.data
        T, lora = data.target_length, config.finetune.lora
        layers = pair_flops(config.model, data.sequence_length, T, lora, trains) // T
        return layers + head_flops(config.model, trains, reaches_layers(config.model, lora, trains))

    # What is measured.

    def values(self, sums: Any, tokenizer: Tokenizer) -> dict[str, float]:
        """Return validation_loss, in nats per token of the targets, and perplexity."""
        loss = float(sums.nll) / float(sums.weight)
        return {"validation_loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def measure(self, validation: Validation) -> dict[str, float]:
        """Return the loss, and measures of generated texts, see `text_measures`."""
        values = super().measure(validation)
        if not self._own.generated_examples:
            return values
        model = validation.model()
        for name in self.validation_sets:
            pairs = validation_sample(open_pairs(self.config.data, name), self._own.generated_examples)
            rows = self._written(model, validation.tokenizer, pairs.first)
            found = text_measures([row.text for row in rows], pairs.second or (), self.config.data)
            values |= {f"{name}_{key}" if name else key: value for key, value in found.items()}
        return values

    def _written(self, model: Any, tokenizer: Tokenizer, sources: Sequence[str]) -> list[Continuation]:
        own, data = self._own, self.config.data
        config = GenerateConfig(
            max_new_tokens=data.target_length,
            batch_size=data.batch_size,
            beams=own.beams,
            length_penalty=own.length_penalty,
        )
        return written(TextGenerator(model, tokenizer, config), sources, data.prefix, data.sequence_length)

    def describe(self, values: Mapping[str, float]) -> str:
        """Return a line of all measures."""
        told = {name: name.replace("_", " ").replace("rouge", "ROUGE-") for name in values}
        return ", ".join(f"{told[name]} {value:.{2 if 'rouge' in name else 4}f}" for name, value in values.items())


def text_measures(texts: Sequence[str], references: Sequence[str], data: DataConfig) -> dict[str, float]:
    """Return measures of generated texts.

    For GLUE those of its classes or numbers, where a text that is none is a wrong class, or 0; for others ROUGE, and
    `exact`, the part of the texts that are the very references.
    """
    glue = glue_task(data)
    if glue is None:
        return {**rouge(texts, references), "exact": exact_part(texts, references)}
    if not glue.classes:
        return number_measures(np.array(list(map(_number, references))), np.array(list(map(_number, texts))))
    labels = np.array([glue.classes.index(text) for text in references])
    known = {name: number for number, name in enumerate(glue.classes)}
    guesses = [known.get(text.strip(), (label + 1) % len(known)) for text, label in zip(texts, labels, strict=True)]
    return class_measures(labels, np.array(guesses), len(known))


def exact_part(texts: Sequence[str], references: Sequence[str]) -> float:
    """Return how many of the texts are their references, as a part of all."""
    return float(
        np.mean([text.strip() == reference.strip() for text, reference in zip(texts, references, strict=True)])
    )


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0


def pair_features(model: Any, batch: Batch, partition: Partition, key: Array | None = None) -> Array:
    """Return what the head of a model that reads sources reads of a batch of pairs."""
    keys = [None, None] if key is None else jax.random.split(key)
    options = [{} if own is None else {"dropout_key": own} for own in keys]
    memory = model.encode(batch["source"], batch["source_ids"], partition, **options[0])
    features_BTC = model.features(batch["tokens"], None, partition, memory=memory, **options[1])
    return partition.constrain(features_BTC, "batch", "tokens", None)


def validation_sample(pairs: Any, count: int) -> Examples:
    """Return some of the pairs, always the same, spread over all of them."""
    return pairs.take(np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(int))


def written(generator: TextGenerator, sources: Sequence[str], prefix: str, length: int) -> list[Continuation]:
    """Return the target of each source, which is cut to `length` tokens as in training; short ones are done first."""
    ids = encode_sources(sources, generator.tokenizer, prefix, length)
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    found = generator.write([ids[place] for place in order], order)
    rows = dict(zip(order, found, strict=True))
    return [rows[place] for place in range(len(ids))]
