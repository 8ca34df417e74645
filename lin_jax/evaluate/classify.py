"""Classes of texts by a model that is there: probabilities, and measures of a table of examples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lin_jax.data.batches import batches_of
from lin_jax.data.examples import Examples
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.layers.partition import WHOLE
from lin_jax.models.registry import MODELS
from lin_jax.settings.base import require
from lin_jax.settings.data import DataConfig
from lin_jax.tasks.classification import log_softmax

# Rows of texts that `classify` gives no longer length for, where the model has no limit of its own.
LONGEST = 512


def classify(
    model: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str | tuple[str, str]],
    *,
    batch_size: int = 32,
    sequence_length: int | None = None,
) -> list[dict[str, float]]:
    """Return the probability of each class, by its name, for each text or pair of texts.

    A model of numbers, with one label, gives {"value": number} instead.

    Args:
        model: that `lin_jax.load` gives.
        tokenizer: likewise.
        texts: texts, or pairs of them; all of one kind.
        batch_size: texts at a time.
        sequence_length: tokens to which a text is cut; by default as many as the model can read, at most 512.

    Raises:
        ConfigError: the model has no head for that, or `texts` are of two kinds.
    """
    require_classifier(model)
    pairs = {isinstance(text, tuple) for text in texts}
    require(len(pairs) < 2, "texts must be all texts or all pairs of texts")
    if not texts:
        return []
    first = [text[0] if isinstance(text, tuple) else text for text in texts]
    second = [text[1] for text in texts if isinstance(text, tuple)] or None
    longest = min(model.config.row_limit or LONGEST, LONGEST)
    data = DataConfig(
        source="table",
        path=("texts",),
        batch_size=min(batch_size, len(texts)),
        sequence_length=longest if sequence_length is None else sequence_length,
    )
    logits = logits_of(model, tokenizer, Examples("texts", first, second, None, range(1, len(texts) + 1)), data)
    if model.config.labels == 1:
        return [{"value": float(value)} for value in logits[:, 0]]
    names = label_names(model)
    return [dict(zip(names, map(float, row), strict=True)) for row in np.exp(log_softmax(logits))]


def require_classifier(model: Any) -> None:
    """Raise `ConfigError` unless a model has a head for classes."""
    architecture = model.config.architecture
    require(
        MODELS[architecture].can_classify and model.config.labels > 0,
        f"the {architecture} has no head for classes: finetune it with finetune.objective=classification",
    )


def label_names(model: Any) -> Sequence[str]:
    """Return the names of a model's classes; their numbers where they have none."""
    return model.config.label_names or tuple(map(str, range(model.config.labels)))


def logits_of(model: Any, tokenizer: Tokenizer, examples: Examples, data: DataConfig) -> np.ndarray:
    """Return the logits of examples, [examples, labels] in float64."""
    graph, arrays = nnx.split(model)
    has_types = MODELS[model.config.architecture].has_token_types

    @jax.jit
    def run(arrays: Any, batch: Mapping[str, Any]) -> Any:
        more = {"token_types_BT": batch["token_types"]} if has_types else {}
        return nnx.merge(graph, arrays).classify(batch["tokens"], batch["segment_ids"], WHOLE, **more)

    return by_example(tokenizer, examples, data, lambda batch: run(arrays, batch), model.config.labels)


def by_example(
    tokenizer: Tokenizer, examples: Examples, data: DataConfig, run: Callable[[Mapping[str, Any]], Any], size: int
) -> np.ndarray:
    """Return what `run` gives for the rows of batches, as rows in the order of the examples, float64.

    Args:
        tokenizer: of the model.
        examples: texts, whose labels are not looked at.
        data: how they become rows.
        run: tokens, token types and segment ids [B, T] to [B, size].
        size: of a row of what it gives.
    """
    found = np.zeros((len(examples), size))
    batches = batches_of(data, tokenizer, examples, np.zeros(len(examples), np.int32), trains=False)
    try:
        for batch in batches:
            read = {name: jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "token_types")}
            real = batch["examples"] >= 0
            found[batch["examples"][real]] = np.asarray(run(read), np.float64)[real]
    finally:
        batches.close()
    return found
