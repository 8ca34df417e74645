"""Whether a converted model computes what its source does."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lin_jax.convert.conversion import conversion_of
from lin_jax.convert.hugging_face import ModelWeights
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.models.base import ModelConfig
from lin_jax.models.registry import MODELS
from lin_jax.ops.product import in_full_float32
from lin_jax.settings.base import require

# Read by both models; a few hundred tokens.
TEXT = (
    "Once upon a time there was a small town by the sea. Every morning the baker lit his oven before the sun was up, "
    "and the smell of bread went down to the harbour, where the boats were coming in. A girl called Ann lived above "
    "the bakery with her grandmother. She liked to count the boats. One day there was one too many: a white boat with "
    'no name and nobody in it. Ann ran down to look. In the boat lay a letter, and in the letter was a key. "What '
    'does it open?" she asked. Her grandmother smiled and said, "I have waited for that key for forty years."'
)
MAX_TOKENS = 512
# Fewer would not tell two models apart.
LEAST_TOKENS = 64
# Logits of the same parameters in float32 differ by the order of sums alone. Narrower parameters are rounded, which
# moves logits by about as much as they are large: 0.011 of the largest one for the stories260K model in bfloat16.
TOLERANCE, NARROW_TOLERANCE = 1e-3, 2e-2


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far the logits of two models lie apart on the same tokens.

    Attributes:
        largest: of all differences.
        scale: the source's largest logit.
        kl: mean of KL(source || result), nats per token.
        tokens: that were compared.
    """

    largest: float
    scale: float
    kl: float
    tokens: int

    def __str__(self) -> str:
        return f"max |logit difference| {self.largest:.2e}, KL {self.kl:.2e} nats per token, over {self.tokens} tokens"

    def require_small(self, what: str, narrow: bool) -> None:
        """Raise `ConfigError` unless the two compute the same.

        Args:
            what: was compared with what, for the message.
            narrow: whether parameters were rounded to a type of 16 bits.
        """
        tolerance = NARROW_TOLERANCE * max(1.0, self.scale) if narrow else TOLERANCE
        # Not `>`: what is no number is no small one.
        require(self.largest <= tolerance, f"{what}: {self}, more than {tolerance:.2g}; nothing was written")


def check_tokens(tokenizer: Tokenizer, vocabulary_size: int, longest: int) -> np.ndarray:
    """Return rows of `TEXT` with at least `LEAST_TOKENS` tokens, [B, T].

    Args:
        tokenizer: of both models.
        vocabulary_size: tokens that they know; random ones go on where the text has too few of them.
        longest: row that they take.
    """
    ids = [tokenizer.start_id, *tokenizer.encode(TEXT).tolist()][:MAX_TOKENS]
    length = min(longest, max(len(ids), LEAST_TOKENS))
    rows = -(-max(len(ids), LEAST_TOKENS) // length)
    more = np.random.default_rng(0).integers(0, vocabulary_size, rows * length - len(ids))
    return np.array([*ids, *more.tolist()], np.int32).reshape(rows, length)


def logits_of(weights: ModelWeights, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits of our model, computed in float32."""
    config: Any = dataclasses.replace(weights.config, dtype="float32")
    graph, state = nnx.split(dataclasses.replace(weights, config=config).model())
    logits = in_full_float32(lambda state, tokens_BT: nnx.merge(graph, state).probe(tokens_BT))
    return np.asarray(jax.jit(logits)(state, tokens_BT))


def logits_of_transformers(directory: Path, config: ModelConfig, tokens_BT: np.ndarray) -> np.ndarray | None:
    """Logits, or features, of Hugging Face's model of a directory, in float32; None without torch.

    Args:
        directory: of the model.
        config: our settings of it.
        tokens_BT: rows, sources and targets alike where the model reads both.
    """
    try:
        import torch
    except ImportError:
        return None
    import transformers

    transformers.utils.logging.disable_progress_bar()
    auto_class: Any = getattr(transformers, conversion_of(config).auto_class(config))
    model: Any = auto_class.from_pretrained(str(directory), dtype=torch.float32).eval()
    tokens = torch.from_numpy(tokens_BT.astype(np.int64))
    targets = {"decoder_input_ids": tokens} if MODELS[config.architecture].reads_source else {}
    with torch.no_grad():
        found = model(input_ids=tokens, **targets)
    return (found.logits if "logits" in found else found.last_hidden_state).numpy()


def compare(source_BTV: np.ndarray, result_BTV: np.ndarray) -> Difference:
    """Return how far two models' logits lie apart."""
    source, result = (np.asarray(jax.nn.log_softmax(jnp.asarray(x), axis=-1)) for x in (source_BTV, result_BTV))
    kl = float(np.mean(np.sum(np.exp(source) * (source - result), axis=-1)))
    largest, scale = float(np.abs(source_BTV - result_BTV).max()), float(np.abs(source_BTV).max())
    return Difference(largest, scale, kl, source.shape[0] * source.shape[1])
