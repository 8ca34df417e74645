"""Vectors of sentences, by a model of whole texts that is there."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.data.examples import Examples
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.evaluate.classify import LONGEST, by_example
from lin_jax.layers.partition import WHOLE
from lin_jax.models.base import Decoder
from lin_jax.models.bert import first_features
from lin_jax.models.registry import MODELS
from lin_jax.settings.base import require
from lin_jax.settings.data import DataConfig


def embed(
    model: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    pooling: str = "mean",
    batch_size: int = 32,
    sequence_length: int | None = None,
) -> np.ndarray:
    """Return a vector of each text, [texts, C] in float32, as long as the model makes it.

    Args:
        model: a BERT that `lin_jax.load` gives.
        tokenizer: likewise.
        texts: one sentence or more each.
        pooling: "mean" of the features of all tokens, [CLS] and [SEP] included, or those of the first, "cls".
        batch_size: texts at a time.
        sequence_length: tokens to which a text is cut; by default as many as the model can read, at most 512.

    Raises:
        ConfigError: the model is another, or `texts` is one text.
    """
    require(not isinstance(texts, str), "texts must be a list of texts, but is one text: put it in a list")
    require(pooling in ("mean", "cls"), f"pooling must be mean or cls, but is {pooling}")
    architecture = model.config.architecture
    require(
        not issubclass(MODELS[architecture], Decoder),
        f"vectors of sentences are made by models of whole texts, such as bert, but this is a {architecture}",
    )
    if not texts:
        return np.zeros((0, model.config.width), np.float32)
    longest = min(model.config.row_limit or LONGEST, LONGEST)
    data = DataConfig(
        source="table",
        path=("texts",),
        batch_size=min(batch_size, len(texts)),
        sequence_length=longest if sequence_length is None else sequence_length,
    )
    graph, arrays = nnx.split(model)

    @jax.jit
    def run(arrays: Any, batch: Mapping[str, Any]) -> Array:
        features_BTC = nnx.merge(graph, arrays).features(
            batch["tokens"], batch["segment_ids"], WHOLE, token_types_BT=batch["token_types"]
        )
        return pool(features_BTC, batch["segment_ids"], pooling)

    examples = Examples("texts", texts, None, None, range(1, len(texts) + 1))
    vectors = by_example(tokenizer, examples, data, lambda batch: run(arrays, batch), model.config.width)
    return vectors.astype(np.float32)


def pool(features_BTC: Float[Array, "B T C"], segment_ids_BT: Int[Array, "B T"], pooling: str) -> Float[Array, "B C"]:
    """Return a vector of each row, float32: the mean over its real tokens, or the features of the first."""
    if pooling == "cls":
        return first_features(features_BTC, segment_ids_BT).astype(jnp.float32)
    real_BT1 = (segment_ids_BT != 0)[:, :, None]
    sum_BC = jnp.sum(jnp.where(real_BT1, features_BTC.astype(jnp.float32), 0), axis=1)
    return sum_BC / jnp.sum(real_BT1, axis=1)
