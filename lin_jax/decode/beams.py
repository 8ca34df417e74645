"""Beam search: of several texts at a time, the one that the model finds likeliest for its length.

As in transformers, whose texts two small T5 gave with it. Of the likeliest `2 beams` next tokens those that end a text
are kept aside, if they are among the first `beams`, with log-probability / tokens ** length_penalty for a score. The
search ends where the best running text, at its present length, has no better score than the worst of `beams` that have
ended.
"""

# Letters beyond the legend: Z = beams of a row, A = tokens that a text may have, I = candidates.

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lin_jax.decode.generate import Generated, Generator
from lin_jax.models.base import DecoderState
from lin_jax.ops.product import in_full_float32

# The score of what is no text; any text has a higher one.
_NONE = -1e9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """A batch in the midst of a search; rows of the model are row by row its beams.

    Attributes:
        state: of the model, rows B Z.
        features_RC: of the last token of each.
        running_BZA: tokens generated so far.
        score_BZ: the sums of their log-probabilities, highest first.
        ended_BZA: the best texts that have ended.
        ended_score_BZ: their scores; `_NONE` where there is none yet.
        ended_length_BZ: their tokens.
        length: tokens of the running texts.
        steps_B: steps that each row has taken.
        done_B: rows whose search has ended.
    """

    state: DecoderState
    features_RC: Float[Array, "R C"]
    running_BZA: Int[Array, "B Z A"]
    score_BZ: Float[Array, "B Z"]
    ended_BZA: Int[Array, "B Z A"]
    ended_score_BZ: Float[Array, "B Z"]
    ended_length_BZ: Int[Array, "B Z"]
    length: Int[Array, ""]
    steps_B: Int[Array, " B"]
    done_B: Bool[Array, " B"]


class BeamSearch(Generator):
    """A model prepared to find the likeliest texts."""

    def capacity(self, longest: int, rows: int) -> int:
        """Return the tokens that a batch has room for in each row, see `Generator`; a row takes `beams` of them."""
        return super().capacity(longest, rows * self.config.beams)

    def stream(
        self,
        prompts: Sequence[np.ndarray],
        samples: Sequence[int],
        *,
        numbers: Sequence[int] | None = None,
        rows: int | None = None,
        ends: Callable[[int, np.ndarray], bool] = lambda row, tokens: False,
    ) -> Iterator[list[Generated]]:
        """Yield the best text of each row when all have been found; it is not known before, and `ends` is not asked."""
        # The prompt is read once, and its state repeated.
        progress = self.start(prompts, samples, numbers=numbers, rows=rows)
        beams = _begin(self.config.beams, self.config.max_new_tokens, progress.state, progress.features_BC)
        while not np.all(beams.done_B):
            beams = _advance(self._graphs[0], self.search, self._arrays[0], beams)
        found = jax.device_get((beams.ended_BZA[:, 0], beams.ended_length_BZ[:, 0], beams.steps_B))
        yield [Generated(text[:length], True, int(steps)) for text, length, steps in zip(*found, strict=True)][
            : len(prompts)
        ]

    @property
    def search(self) -> "Search":
        """What a program of the search is compiled for."""
        return Search(self.config.length_penalty, self.config.block, self._plan.stop_ids)


@dataclasses.dataclass(frozen=True)
class Search:
    """What decides a search: see `GenerateConfig`."""

    length_penalty: float
    block: int
    stop_ids: tuple[int, ...]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(beams: int, most: int, state: DecoderState, features_BC: Array) -> Beams:
    """Return the beams of each row, which are equal at first, so that only one of them counts."""
    B = features_BC.shape[0]
    no_text_BZ = jnp.full((B, beams), _NONE, jnp.float32)
    no_tokens_BZA = jnp.zeros((B, beams, most), jnp.int32)
    return Beams(
        state=jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), state),
        features_RC=jnp.repeat(features_BC, beams, axis=0),
        running_BZA=no_tokens_BZA,
        score_BZ=no_text_BZ.at[:, 0].set(0.0),
        ended_BZA=no_tokens_BZA,
        ended_score_BZ=no_text_BZ,
        ended_length_BZ=jnp.zeros((B, beams), jnp.int32),
        length=jnp.zeros((), jnp.int32),
        steps_B=jnp.zeros(B, jnp.int32),
        done_B=state.length_B == 0,
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
@in_full_float32
def _advance(graph: Any, search: Search, arrays: Any, beams: Beams) -> Beams:
    """Return the beams after up to `block` tokens more."""
    model = nnx.merge(graph, arrays)

    def unfinished(carry: tuple[Array, Beams]) -> Array:
        return (carry[0] < search.block) & ~jnp.all(carry[1].done_B)

    def step(carry: tuple[Array, Beams]) -> tuple[Array, Beams]:
        return carry[0] + 1, _step(model, search, carry[1])

    return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), beams))[1]


def _step(model: Any, search: Search, beams: Beams) -> Beams:
    B, Z, A = beams.running_BZA.shape
    log_BZV = jax.nn.log_softmax(model.head(beams.features_RC)).reshape(B, Z, -1) + beams.score_BZ[:, :, None]
    V, length = log_BZV.shape[2], beams.length + 1
    # So many that `beams` of them go on even where the others end; fewer where the vocabulary is that small.
    score_BI, place_BI = jax.lax.top_k(log_BZV.reshape(B, Z * V), min(max(2, 1 + len(search.stop_ids)) * Z, Z * V))
    parent_BI, token_BI = place_BI // V, place_BI % V
    text_BIA = (
        jnp.take_along_axis(beams.running_BZA, parent_BI[:, :, None], axis=1).at[:, :, beams.length].set(token_BI)
    )
    ends_BI = jnp.isin(token_BI, jnp.asarray(search.stop_ids, jnp.int32)) | (length == A)

    is_first_BI = jnp.arange(score_BI.shape[1])[None] < Z
    takes_BI = ends_BI & is_first_BI & ~beams.done_B[:, None]
    new_BI = jnp.where(takes_BI, score_BI / length.astype(jnp.float32) ** search.length_penalty, _NONE)
    ended_score_BZ, best_BZ = jax.lax.top_k(jnp.concatenate([beams.ended_score_BZ, new_BI], axis=1), Z)
    pick = lambda old, new: jnp.take_along_axis(jnp.concatenate([old, new], axis=1), best_BZ, axis=1)  # noqa: E731
    ended_length_BZ = pick(beams.ended_length_BZ, jnp.broadcast_to(length, ends_BI.shape))
    ended_BZA = jnp.take_along_axis(jnp.concatenate([beams.ended_BZA, text_BIA], axis=1), best_BZ[:, :, None], axis=1)

    running_BZ, chosen_BZ = jax.lax.top_k(jnp.where(ends_BI, _NONE + score_BI, score_BI), Z)
    token_BZ, parent_BZ = (jnp.take_along_axis(x, chosen_BZ, axis=1) for x in (token_BI, parent_BI))
    row_R = (jnp.arange(B)[:, None] * Z + parent_BZ).reshape(-1)
    x_R1C, state = model.forward(token_BZ.reshape(-1, 1), model.take(beams.state, row_R))
    best_possible_B = running_BZ[:, 0] / length.astype(jnp.float32) ** search.length_penalty
    improves_B = best_possible_B > jnp.min(ended_score_BZ, axis=1)
    return Beams(
        state=state,
        features_RC=x_R1C[:, 0],
        running_BZA=jnp.take_along_axis(text_BIA, chosen_BZ[:, :, None], axis=1),
        score_BZ=running_BZ,
        ended_BZA=ended_BZA,
        ended_score_BZ=ended_score_BZ,
        ended_length_BZ=ended_length_BZ,
        length=length,
        steps_B=beams.steps_B + ~beams.done_B,
        done_B=beams.done_B | ~improves_B | (length == A),
    )
