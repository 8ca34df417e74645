"""Classification of texts and pairs of texts, or a number for each: GLUE and any table."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lin_jax.data.batches import batches_of
from lin_jax.data.checks import check_fits
from lin_jax.data.examples import (
    TRAIN,
    are_numbers,
    class_names,
    glue_task,
    labels_of,
    open_examples,
    spellings,
    test_names,
    validation_names,
)
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.layers.parameter import Path
from lin_jax.layers.partition import Partition
from lin_jax.models.base import ModelConfig
from lin_jax.models.flops import Flops, layer_flops, pair_flops
from lin_jax.models.registry import MODELS
from lin_jax.models.structure import Structure
from lin_jax.settings.base import require, setting
from lin_jax.settings.finetune import FinetuneConfig
from lin_jax.tasks.base import Batch, BatchField, Evaluation, Loss, ResultFile, RunSettings, Task, Validation
from lin_jax.tasks.epochs import steps_of_epochs
from lin_jax.tasks.loss import LossSums
from lin_jax.tasks.measures import class_measures, number_measures


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationFinetuneConfig(FinetuneConfig):
    """Classes or numbers of texts and pairs of texts."""

    objective: Literal["classification"] = setting("classification", "what is learned")
    fresh_head: bool = setting(
        False, "start the head from random parameters also where checkpoint has one, of other classes for example"
    )


class Classification(Task):
    """Cross-entropy of the classes, or the squared error of numbers, of a head that always trains.

    Measured by what `lin_jax.tasks.measures` has; the best is that which GLUE names for its task, else accuracy or the
    mean of both correlations. Classes are those of the data, by name, in the order of the model's own if it has names.
    """

    settings = ClassificationFinetuneConfig
    counts_examples = True
    unit = "examples"
    higher_is_better = True

    def __init__(self, config: RunSettings):
        super().__init__(config)
        data, model = config.data, MODELS[config.model.architecture]
        glue = glue_task(data)
        self.best_by = glue.measure if glue else "correlation" if are_numbers(data) else "accuracy"
        if data.source in ("glue", "table"):
            self.validation_sets = validation_names(data)
        self.adds = model.classifier
        self.starts_fresh = model.classifier if getattr(config.finetune, "fresh_head", False) else ()

    def check(self) -> None:
        """Raise `ConfigError` for models that cannot classify, and for data without labels."""
        super().check()
        source, architecture = self.config.data.source, self.config.model.architecture
        can = [name for name in MODELS if MODELS[name].can_classify]
        require(
            MODELS[architecture].can_classify,
            f"finetune.objective=classification cannot be done by {architecture}; models that can: {', '.join(can)}",
        )
        require(
            source in ("glue", "table"),
            f"finetune.objective=classification needs labelled examples, but data.source is {source}: give glue or "
            "table",
        )

    def complete(self) -> RunSettings:
        """Return settings with the classes of the data, and the steps that `train.epochs` come to."""
        config: Any = self.config
        model = self._with_labels(config.model)
        examples = len(open_examples(config.data, TRAIN))
        return dataclasses.replace(config, model=model, train=steps_of_epochs(config, examples))

    def planned(self) -> RunSettings:
        """Return settings with a head: of GLUE's classes, or of two where a table would tell."""
        config: Any = self.config
        glue = glue_task(config.data)
        if config.model.labels:
            return self.config
        labels = 1 if are_numbers(config.data) else len(glue.classes) if glue else 2
        return dataclasses.replace(config, model=config.model.with_classes(labels, ()))

    def _with_labels(self, model: Any) -> ModelConfig:
        names = class_names(self.config.data)
        count = 1 if are_numbers(self.config.data) else len(names)
        require(
            count > 1 or are_numbers(self.config.data),
            f"the training examples are all of one class, {', '.join(names)}; set data.label_field",
        )
        named = model.label_names
        if not model.labels or self.starts_fresh:
            return model.with_classes(count, names)
        require(
            model.labels == count or (bool(named) and set(names) <= set(named)),
            f"the model has a head of {model.labels} classes, but the data have {count}: set "
            "finetune.fresh_head=True to start one for these, or model.labels=0 where finetune.checkpoint has none",
        )
        require(
            not named or set(names) <= set(named),
            f"the model's classes are {', '.join(named)}, but the data's {', '.join(names)}: name them alike, or set "
            "finetune.fresh_head=True",
        )
        return model if named else dataclasses.replace(model, label_names=names)

    def free_of(self, base: ModelConfig) -> tuple[str, ...]:
        """Return the settings of the head; raise `ConfigError` where `base` has one of other classes."""
        model: Any = self.config.model
        had, named = getattr(base, "labels", 0), getattr(base, "label_names", ())
        if had and not self.starts_fresh:
            path = self.config.finetune.checkpoint
            require(
                had == model.labels,
                f"finetune.checkpoint={path} has a head of {had} classes, but the data have {model.labels}: set "
                "finetune.fresh_head=True to start one from random parameters",
            )
            require(
                not named or named == model.label_names,
                f"finetune.checkpoint={path} has the classes {', '.join(named)}, but the data "
                f"{', '.join(model.label_names)}: name them alike, or set finetune.fresh_head=True",
            )
        return "labels", "label_names"

    # The data.

    @property
    def _numbers(self) -> bool:
        return are_numbers(self.config.data)

    def batch_fields(self) -> Mapping[str, BatchField]:
        """Return tokens, their types, segment ids, labels, weights and the numbers of examples."""
        data = self.config.data
        rows, length = data.batch_size, data.sequence_length
        of_tokens = BatchField((rows, length), ("batch", "tokens"), np.int32)
        of_rows = {"labels": np.float32 if self._numbers else np.int32, "weights": np.float32, "examples": np.int32}
        names = ("tokens", "segment_ids", *(("token_types",) if self._has_types else ()))
        return {name: of_tokens for name in names} | {
            name: BatchField((rows,), ("batch",), kind) for name, kind in of_rows.items()
        }

    @property
    def _has_types(self) -> bool:
        return MODELS[self.config.model.architecture].has_token_types

    def check_data(self, tokenizer: Tokenizer) -> str:
        """Return the fingerprint of the training examples; raise `ConfigError` for wrong labels in any split."""
        data, model = self.config.data, self.config.model
        check_fits(
            tokenizer.vocabulary_size, model.vocabulary_size, f"the vocabulary of data.tokenizer={data.tokenizer}"
        )
        tokenizer.encode_examples(["a"], ["a"], data.sequence_length)
        for split in (TRAIN, *self.validation_sets, *test_names(data)):
            self._labels(split)
        return open_examples(data, TRAIN).fingerprint

    def _labels(self, split: str) -> np.ndarray:
        model: Any = self.config.model
        return labels_of(open_examples(self.config.data, split), self.config.data, model.label_names)

    def training_batches(self, tokenizer: Tokenizer, rows: Sequence[int] | np.ndarray) -> grain.DatasetIterator:
        """Return batches of the training split."""
        data = self.config.data
        return batches_of(data, tokenizer, open_examples(data, TRAIN), self._labels(TRAIN), rows, trains=True)

    def validation_batches(
        self, name: str, tokenizer: Tokenizer, rows: Sequence[int] | np.ndarray
    ) -> grain.DatasetIterator:
        """Return batches of a validation or test set, each example once."""
        data = self.config.data
        return batches_of(data, tokenizer, open_examples(data, name), self._labels(name), rows, trains=False)

    def real_tokens(self, batch: Batch) -> tuple[Array, int]:
        """Return the tokens of texts, and of all rows."""
        real_BT = (batch["segment_ids"] != 0) & (batch["weights"] > 0)[:, None]
        return jnp.sum(real_BT, dtype=jnp.int32), real_BT.size

    # What is learned.

    def logits(
        self, model: Any, batch: Batch, partition: Partition, key: Array | None = None
    ) -> Float[Array, "B labels"]:
        """Return the logits of the classes, or numbers, of a batch."""
        more: dict[str, Any] = {} if key is None else {"dropout_key": key}
        if self._has_types:
            more["token_types_BT"] = batch["token_types"]
        return model.classify(batch["tokens"], batch["segment_ids"], partition, **more)

    def loss(self, structure: Structure, partition: Partition) -> Loss:
        """Return the cross-entropy, or squared error."""

        def loss(trained: Any, frozen: Any, constants: Any, batch: Batch, key: Array | None) -> LossSums:
            model = structure.model(trained, frozen, constants, partition)
            logits = self.logits(model, batch, partition, key)
            if self._numbers:
                losses_B = jnp.square(logits[:, 0] - batch["labels"])
            else:
                chosen = jnp.take_along_axis(logits, jnp.maximum(batch["labels"], 0)[:, None], axis=1)[:, 0]
                losses_B = jax.nn.logsumexp(logits, axis=1) - chosen
            total = jnp.sum(losses_B * batch["weights"])
            return LossSums(total, total, jnp.sum(batch["weights"]))

        return loss

    def flops(self, trains: Callable[[Path], bool], *, tiled: bool) -> Flops:
        """Return the operations of the layers; a head that reads a token of a row is next to nothing."""
        config, T = self.config, self.config.data.sequence_length
        if MODELS[config.model.architecture].reads_source:  # The row is source and target.
            return pair_flops(config.model, T, T, config.finetune.lora, trains) // T
        return layer_flops(config.model, T, config.finetune.lora, trains, tiled=tiled)

    # What is measured.

    def evaluation(self, structure: Structure, partition: Partition) -> Evaluation:
        """Return the function that gives logits and labels of the rows, with the numbers of their examples."""

        def evaluate(trained: Any, frozen: Any, constants: Any, batch: Batch) -> dict[str, Array]:
            model = structure.model(trained, frozen, constants, partition)
            kept = {name: batch[name] for name in ("labels", "examples")}
            return {"logits": self.logits(model, batch, partition), **kept}

        return evaluate

    def measure(self, validation: Validation) -> dict[str, float]:
        """Return the measures of all validation sets by name."""
        measured: dict[str, float] = {}
        for name in self.validation_sets:
            values = self.values(validation.rows(name), validation.tokenizer)
            measured |= {f"{name}_{key}" if name else key: value for key, value in values.items()}
        return measured

    def values(self, sums: Any, tokenizer: Tokenizer) -> dict[str, float]:
        """Return loss and measures of the rows that `evaluation` gives."""
        logits, labels = in_order(sums)
        if self._numbers:
            loss = float(np.mean(np.square(logits[:, 0] - labels)))
            return {"validation_loss": loss, **number_measures(labels, logits[:, 0])}
        chosen = log_softmax(logits)[np.arange(len(labels)), labels]
        return {
            "validation_loss": float(-np.mean(chosen)),
            **class_measures(labels, np.argmax(logits, axis=1), logits.shape[1]),
        }

    def describe(self, values: Mapping[str, float]) -> str:
        """Return a line of all measures."""
        return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())

    def results(self, values: Mapping[str, float], validation: Validation) -> Sequence[ResultFile]:
        """Return predictions for the test sets that there are, as the server of GLUE takes them."""
        return [
            ResultFile(f"{name}.tsv", self.predictions(validation.rows(name)), "predictions of the last step")
            for name in test_names(self.config.data)
        ]

    def predictions(self, rows: Any) -> str:
        """Return a file of predictions: for each example its number from 0 and its class as the data spell it."""
        logits, _ = in_order(rows)
        model: Any = self.config.model
        if self._numbers:
            found = [f"{value:.4f}" for value in logits[:, 0]]
        else:
            names = model.label_names or tuple(map(str, range(model.labels)))
            spelled = spellings(self.config.data, names)
            found = [spelled[int(number)] for number in np.argmax(logits, axis=1)]
        return "".join(f"{index}\t{text}\n" for index, text in [("index", "prediction"), *enumerate(found)])


def in_order(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and labels by the number of their example, without rows that fill up a batch."""
    real = rows["examples"] >= 0
    order = np.argsort(rows["examples"][real])
    return rows["logits"][real][order].astype(np.float64), rows["labels"][real][order]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log probabilities, in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
