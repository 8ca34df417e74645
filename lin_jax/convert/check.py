"""Whether a converted model computes what its source does."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lin_jax.convert.hugging_face import ModelWeights
from lin_jax.data.tokenizers import Tokenizer

# Read by both models; a few hundred tokens.
TEXT = (
    "Once upon a time there was a small town by the sea. Every morning the baker lit his oven before the sun was up, "
    "and the smell of bread went down to the harbour, where the boats were coming in. A girl called Ann lived above "
    "the bakery with her grandmother. She liked to count the boats. One day there was one too many: a white boat with "
    'no name and nobody in it. Ann ran down to look. In the boat lay a letter, and in the letter was a key. "What '
    'does it open?" she asked. Her grandmother smiled and said, "I have waited for that key for forty years."'
)
MAX_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far the logits of two models lie apart on the same tokens."""

    largest: float
    kl: float
    tokens: int

    def __str__(self) -> str:
        return f"max |logit difference| {self.largest:.2e}, KL {self.kl:.2e} nats a token, over {self.tokens} tokens"


def check_tokens(tokenizer: Tokenizer, longest: int) -> np.ndarray:
    """One row of `TEXT`, [1, T]."""
    ids = [tokenizer.start_id, *tokenizer.encode(TEXT).tolist()]
    return np.array([ids[: min(longest, MAX_TOKENS)]], np.int32)


def logits_of(weights: ModelWeights, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits of our model, computed in float32."""
    config: Any = dataclasses.replace(weights.config, dtype="float32")
    graph, state = nnx.split(dataclasses.replace(weights, config=config).model())
    return np.asarray(jax.jit(lambda state, tokens_BT: nnx.merge(graph, state)(tokens_BT))(state, tokens_BT))


def logits_of_transformers(directory: Path, tokens_BT: np.ndarray) -> np.ndarray | None:
    """Logits of Hugging Face's model of a directory, in float32; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens_BT.astype(np.int64))).logits.numpy()


def compare(source_BTV: np.ndarray, result_BTV: np.ndarray) -> Difference:
    """Largest difference, and the mean of KL(source || result)."""
    source, result = (np.asarray(jax.nn.log_softmax(jnp.asarray(x), axis=-1)) for x in (source_BTV, result_BTV))
    kl = float(np.mean(np.sum(np.exp(source) * (source - result), axis=-1)))
    return Difference(float(np.abs(source_BTV - result_BTV).max()), kl, source.shape[0] * source.shape[1])
