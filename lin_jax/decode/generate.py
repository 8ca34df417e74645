"""The loop that continues token sequences: guess, verify, keep, all of it on the device."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from lin_jax.decode.accept import accept_exact, accept_typical
from lin_jax.decode.draft import from_heads, lookup
from lin_jax.decode.memory import bytes_of, require_memory
from lin_jax.decode.sampling import adjust, choose, seen_at_nodes, sequence_keys
from lin_jax.decode.trees import find_tree
from lin_jax.models.base import Decoder, DecoderState, unstacked
from lin_jax.models.medusa import MedusaHeads, check_heads
from lin_jax.ops.checksums import checksums
from lin_jax.ops.product import in_full_float32
from lin_jax.ops.target import decoding_type
from lin_jax.ops.tree import Tree, chain
from lin_jax.settings.base import require
from lin_jax.settings.generate import GenerateConfig

# Least capacity; see `_rounded`.
_LEAST = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """A batch in the midst of generation.

    Attributes:
        state: of the model, after all tokens of `text_BX`.
        source_BS: for guesses by look-up, what stands before the text: the source, with -1 in front of it; without
            columns where there is none.
        text_BX: prompts and what was generated; of each row the first `state.length_B` tokens.
        next_B: the token that follows, chosen but not in the text yet.
        features_BC: of the last token of the text.
        seen_BV: tokens that the text holds; without columns unless there is a repetition penalty.
        key_B: random keys.
        left_B: tokens that may still be generated.
        done_B: rows that have ended.
        steps_B: steps in which a row generated something.
    """

    state: DecoderState
    source_BS: Int[Array, "B S"]
    text_BX: Int[Array, "B X"]
    next_B: Int[Array, " B"]
    features_BC: Float[Array, "B C"]
    seen_BV: Bool[Array, "B V"]
    key_B: Key[Array, " B"]
    left_B: Int[Array, " B"]
    done_B: Bool[Array, " B"]
    steps_B: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a program is compiled for; see `_compiled`."""

    config: GenerateConfig
    tree: Tree
    stop_ids: tuple[int, ...]


class Generated(NamedTuple):
    """One row of what `generate_tokens` yields.

    Attributes:
        tokens: generated so far, a token that ended the row included.
        done: whether the row has ended.
        steps: passes through the model that it took.
    """

    tokens: np.ndarray
    done: bool
    steps: int


class Generator:
    """A model, with its Medusa heads if it has any, prepared to continue sequences in batches."""

    def __init__(
        self,
        model: Decoder,
        config: GenerateConfig,
        *,
        heads: MedusaHeads | None = None,
        stop_ids: Sequence[int] = (),
    ):
        """Check what is asked for.

        Args:
            model: any language model.
            config: how to continue.
            heads: for `config.draft="medusa"`.
            stop_ids: tokens that end a sequence; they are part of it.

        Raises:
            ConfigError: the settings do not fit the model or the heads.
        """
        self.model = unstacked(model)
        self.config = config
        self._fitting: set[tuple[int, int, int]] = set()
        self._plan = _Plan(_compiled(config), _tree(model, config, heads), tuple(sorted(set(stop_ids))))
        self._reads_source = model.reads_source
        parts = (self.model, heads if config.draft == "medusa" else None)
        split = [(None, None) if part is None else nnx.split(part) for part in parts]
        self._graphs, self._arrays = tuple(graph for graph, _ in split), tuple(arrays for _, arrays in split)

    def capacity(self, longest: int, rows: int) -> int:
        """Return the tokens that a batch has room for in each row; the longest prompt has `longest`.

        A model that reads a source has prompts for sources, and rows that begin with its `start_token`.

        Raises:
            ConfigError: that is more than the model takes, or than the memory does.
        """
        source = _rounded(longest) if self._reads_source else 0
        needed = (1 if source else longest) + self.config.max_new_tokens
        self.model.check_decodable(needed)
        rounded = _rounded(needed)
        capacity = min(rounded, max(needed, getattr(self.model.config, "positions", rounded)))
        if (rows, source, capacity) not in self._fitting:
            state = bytes_of(lambda: self._state(np.zeros((rows, source), np.int32), capacity))
            texts = 4 * rows * capacity
            logits = 4 * rows * self.tree.nodes * self.model.config.vocabulary_size
            fix = "lower batch_size, max_new_tokens, or what is guessed at a time"
            told = f"generation of {rows} texts of {needed:,} tokens at a time"
            require_memory(state + texts + logits, f"{told}{f', of {longest:,} of a source' if source else ''}", fix)
            self._fitting.add((rows, source, capacity))
        return capacity

    def _state(self, source_BS: np.ndarray, capacity: int) -> DecoderState:
        """Return the state before the first token; sources are there for models that read some, padded with -1."""
        if self._reads_source:
            return _encode(self._graphs[0], capacity, self._arrays[0], source_BS)
        return self.model.empty_state(source_BS.shape[0], capacity)

    def fingerprint(self) -> str:
        """Return a checksum of the model: settings and parameters, and those of heads where they decide tokens."""
        arrays = self._arrays[: 2 if self.config.acceptance == "typical" else 1]
        return hashlib.sha256(f"{self.model.config} {checksums(arrays)}".encode()).hexdigest()

    def start(
        self,
        prompts: Sequence[np.ndarray],
        samples: Sequence[int],
        *,
        numbers: Sequence[int] | None = None,
        rows: int | None = None,
    ) -> Progress:
        """Read prompts, in chunks of `config.prefill_chunk` tokens; sources are encoded whole.

        Args:
            prompts: token ids of each row, at least one.
            samples: which sample of its prompt each row is.
            numbers: of each row's prompt, by default 0, 1, ...; with the seed and the sample it decides the row's
                random numbers.
            rows: rows of the batch; those without a prompt are done from the start.

        Raises:
            ConfigError: a prompt is empty, or too long for the model.
        """
        require(all(len(prompt) for prompt in prompts), "a prompt is empty: give at least one token")
        B, longest = rows or len(prompts), max(len(prompt) for prompt in prompts)
        capacity = self.capacity(longest, B)
        source_BS = self._sources(prompts, B, longest)
        text_BX, length_B = np.zeros((B, capacity), np.int32), np.zeros(B, np.int32)
        for row, text in enumerate(self.beginnings(prompts)):
            text_BX[row, : len(text)], length_B[row] = text, len(text)
        state, features_BC = self._read(self._state(source_BS, capacity), text_BX, length_B)
        number_B, sample_B = np.zeros(B, np.int32), np.zeros(B, np.int32)
        number_B[: len(prompts)] = range(len(prompts)) if numbers is None else numbers
        sample_B[: len(samples)] = samples
        keys_of = np.uint32(self.config.sampling.seed), number_B, sample_B
        new = np.int32(self.config.max_new_tokens)
        searched_BS = source_BS if self.config.draft == "lookup" else source_BS[:, :0]
        return _begin(self._graphs, self._plan, self._arrays, state, searched_BS, text_BX, features_BC, keys_of, new)

    def beginnings(self, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return what rows begin with: the prompts, or `start_token` where these are sources."""
        if not self._reads_source:
            return list(prompts)
        return [np.array([self.model.config.start_token], np.int32)] * len(prompts)

    def _sources(self, prompts: Sequence[np.ndarray], rows: int, longest: int) -> np.ndarray:
        """Return the sources, with -1 in front; without columns for models that read none."""
        source_BS = np.full((rows, _rounded(longest) if self._reads_source else 0), -1, np.int32)
        for row, prompt in enumerate(prompts if self._reads_source else ()):
            source_BS[row, -len(prompt) :] = prompt
        return source_BS

    def _read(self, state: DecoderState, text_BX: np.ndarray, length_B: np.ndarray) -> tuple[DecoderState, Array]:
        """State and features of the last token of every row."""
        B, longest = len(length_B), int(length_B.max())
        T = min(self.config.prefill_chunk, 1 << (longest - 1).bit_length())
        features_BC = jnp.zeros((B, self.model.config.width), decoding_type(self.model.config.dtype))
        for start in range(0, longest, T):
            tokens_BT = np.zeros((B, T), np.int32)
            part = text_BX[:, start : start + T]
            tokens_BT[:, : part.shape[1]] = part
            count_B = np.clip(length_B - start, 0, T)
            state, features_BC = _read_chunk(self._graphs[0], self._arrays[0], state, features_BC, tokens_BT, count_B)
        return state, features_BC

    @property
    def tree(self) -> Tree:
        """The tree of guesses; the root alone without a draft."""
        return self._plan.tree

    def advance(self, progress: Progress) -> Progress:
        """Up to `config.block` steps, fewer if all rows end; `progress` must not be used any more."""
        return _advance(self._graphs, self._plan, self._arrays, progress)

    def stream(
        self,
        prompts: Sequence[np.ndarray],
        samples: Sequence[int],
        *,
        numbers: Sequence[int] | None = None,
        rows: int | None = None,
        ends: Callable[[int, np.ndarray], bool] = lambda row, tokens: False,
    ) -> Iterator[list[Generated]]:
        """What was generated so far, after every block of steps, until all rows have ended; see `start`.

        `ends` is asked after every block whether what a row (by its number) generated ends it for a reason that the
        model cannot see.
        """
        lengths = [len(text) for text in self.beginnings(prompts)]
        progress, done = self.start(prompts, samples, numbers=numbers, rows=rows), False
        while not done:
            progress = self.advance(progress)
            rows_now = enumerate(read_rows(progress, lengths))
            found = [row._replace(done=row.done or ends(number, row.tokens)) for number, row in rows_now]
            done = all(row.done for row in found)
            done_B = np.ones(len(progress.done_B), bool)
            done_B[: len(found)] = [row.done for row in found]
            progress = dataclasses.replace(progress, done_B=jnp.asarray(done_B))
            yield found


def _compiled(config: GenerateConfig) -> GenerateConfig:
    """The settings that programs depend on; the others are set to one value, so that they share the programs."""
    sampling = dataclasses.replace(config.sampling, seed=0)
    plain = GenerateConfig(draft=config.draft, block=config.block, sampling=sampling)
    kept = ("lookup_tokens", "lookup_match", "acceptance", "typical_threshold", "typical_alpha")
    return dataclasses.replace(plain, **{name: getattr(config, name) for name in kept})


def _rounded(tokens: int) -> int:
    """A capacity for so many tokens: one of two in every doubling, so that most lengths share a program."""
    unit = max(_LEAST, (1 << (tokens - 1).bit_length()) // 4)
    return -(-tokens // unit) * unit


def read_rows(progress: Progress, lengths: Sequence[int]) -> list[Generated]:
    """What was generated so far in each row, behind prompts of these lengths."""
    found = jax.device_get((progress.text_BX, progress.state.length_B, progress.done_B, progress.steps_B))
    text_BX, end_B, done_B, steps_B = found
    return [
        Generated(text_BX[row, start : end_B[row]], bool(done_B[row]), int(steps_B[row]))
        for row, start in enumerate(lengths)
    ]


def generate_tokens(
    model: Decoder,
    config: GenerateConfig,
    prompts: Sequence[np.ndarray],
    *,
    heads: MedusaHeads | None = None,
    stop_ids: Sequence[int] = (),
) -> list[Generated]:
    """Continue one batch of prompts, a single sample each, to their ends; see `Generator`."""
    *_, rows = Generator(model, config, heads=heads, stop_ids=stop_ids).stream(prompts, [0] * len(prompts))
    return rows


def _tree(model: Decoder, config: GenerateConfig, heads: MedusaHeads | None) -> Tree:
    """The tree of guesses that the settings mean."""
    if config.draft == "none":
        return chain(1)
    if config.draft == "lookup":
        return chain(1 + config.lookup_tokens)
    if heads is None:
        require(False, "draft=medusa needs a model with Medusa heads: use draft=lookup or none, or train heads")
    assert heads is not None
    tree, count = find_tree(config.tree), heads.config.heads
    check_heads(heads, model.config)
    require(
        tree.height - 1 <= count,
        f"tree={config.tree} is {tree.height - 1} guesses deep, but the model has {count} Medusa heads",
    )
    V = model.config.vocabulary_size
    require(tree.widest_rank <= V, f"tree={config.tree} takes guess {tree.widest_rank}, but there are {V} tokens")
    return tree


@functools.partial(jax.jit, static_argnums=(0, 1))
@in_full_float32
def _encode(graph: Any, capacity: int, arrays: Any, source_BS: Array) -> DecoderState:
    real_BS = source_BS >= 0
    return nnx.merge(graph, arrays).start(jnp.where(real_BS, source_BS, 0), real_BS.astype(jnp.int32), capacity)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
@in_full_float32
def _read_chunk(
    graph: Any, arrays: Any, state: DecoderState, features_BC: Array, tokens_BT: Array, count_B: Array
) -> tuple[DecoderState, Array]:
    model = nnx.merge(graph, arrays)
    x_BTC, state = model.forward(tokens_BT, state, jnp.arange(tokens_BT.shape[1])[None] < count_B[:, None])
    last_BC = jnp.take_along_axis(x_BTC, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)[:, 0]
    return state, jnp.where(count_B[:, None] > 0, last_BC, features_BC)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
@in_full_float32
def _begin(
    graphs: tuple[Any, Any],
    plan: _Plan,
    arrays: tuple[Any, Any],
    state: DecoderState,
    source_BS: Array,
    text_BX: Array,
    features_BC: Array,
    keys_of: tuple[Array, Array, Array],
    max_new_tokens: Array,
) -> Progress:
    """The first choice, from the features of the prompts' last tokens."""
    model, sampling = nnx.merge(graphs[0], arrays[0]), plan.config.sampling
    key_B, (B, X) = sequence_keys(*keys_of), text_BX.shape
    V = model.config.vocabulary_size if sampling.repetition_penalty != 1 else 0
    token_BX = jnp.where(jnp.arange(X)[None] < state.length_B[:, None], text_BX, V)
    seen_BV = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], token_BX].set(True, mode="drop")
    logits_B1V = adjust(model.head(features_BC)[:, None], sampling, seen_BV[:, None] if V else None)
    return Progress(
        state=state,
        source_BS=source_BS,
        text_BX=text_BX,
        next_B=choose(logits_B1V, sampling, key_B, state.length_B, chain(1))[:, 0],
        features_BC=features_BC,
        seen_BV=seen_BV,
        key_B=key_B,
        left_B=jnp.full(B, max_new_tokens),
        done_B=state.length_B == 0,
        steps_B=jnp.zeros(B, jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
@in_full_float32
def _advance(graphs: tuple[Any, Any], plan: _Plan, arrays: tuple[Any, Any], progress: Progress) -> Progress:
    model = nnx.merge(graphs[0], arrays[0])
    heads = None if graphs[1] is None else nnx.merge(graphs[1], arrays[1])

    def unfinished(carry: tuple[Array, Progress]) -> Array:
        return (carry[0] < plan.config.block) & ~jnp.all(carry[1].done_B)

    def step(carry: tuple[Array, Progress]) -> tuple[Array, Progress]:
        return carry[0] + 1, _step(model, heads, plan, carry[1])

    return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), progress))[1]


def _step(model: Any, heads: MedusaHeads | None, plan: _Plan, progress: Progress) -> Progress:
    """Guess, verify, and keep what is accepted: at least the root, which was chosen before."""
    tree, state = plan.tree, progress.state
    tokens_BM = _guess(heads, plan, progress)
    x_BMC, pending = model.verify(tokens_BM, tree, state)
    penalised = plan.config.sampling.repetition_penalty != 1
    seen_BMV = seen_at_nodes(progress.seen_BV, tokens_BM, tree) if penalised else None
    logits_BMV = adjust(model.head(x_BMC), plan.config.sampling, seen_BMV)
    choice_BM = choose(logits_BMV, plan.config.sampling, progress.key_B, state.length_B + 1, tree)
    path_BP, count_B, ended_B = _keep(plan, progress, tokens_BM, choice_BM, logits_BMV)
    last_B = jnp.take_along_axis(path_BP, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
    at_last = lambda x_BM: x_BM[jnp.arange(len(last_B)), last_B]  # noqa: E731
    moves_B = count_B > 0
    return Progress(
        state=model.commit(state, pending, path_BP, count_B),
        source_BS=progress.source_BS,
        text_BX=_write(progress.text_BX, state.length_B, jnp.take_along_axis(tokens_BM, path_BP, axis=1), count_B),
        next_B=jnp.where(moves_B, at_last(choice_BM), progress.next_B),
        features_BC=jnp.where(moves_B[:, None], at_last(x_BMC), progress.features_BC),
        seen_BV=progress.seen_BV
        if seen_BMV is None
        else jnp.where(moves_B[:, None], at_last(seen_BMV), progress.seen_BV),
        key_B=progress.key_B,
        left_B=progress.left_B - count_B,
        done_B=progress.done_B | ended_B,
        steps_B=progress.steps_B + moves_B,
    )


def _guess(heads: MedusaHeads | None, plan: _Plan, progress: Progress) -> Int[Array, "B M"]:
    """The tokens of all nodes, the root's being the one that was chosen."""
    root_B1, config = progress.next_B[:, None], plan.config
    if heads is not None:
        return from_heads(heads(progress.features_BC), progress.next_B, plan.tree)
    if config.draft == "none":
        return root_B1
    guesses = {"tokens": config.lookup_tokens, "match": config.lookup_match}
    # A target often says what its source does, which ends where it begins.
    known_BX = jnp.concatenate([progress.source_BS, progress.text_BX], axis=1)
    length_B = progress.source_BS.shape[1] + progress.state.length_B
    found_BT = lookup(known_BX, length_B, progress.next_B, **guesses)
    return jnp.concatenate([root_B1, found_BT], axis=1)


def _keep(
    plan: _Plan, progress: Progress, tokens_BM: Array, choice_BM: Array, logits_BMV: Array
) -> tuple[Array, Array, Array]:
    """The path of each row, how many nodes of it are kept, and whether the row ends with them."""
    config, tree = plan.config, plan.tree
    if config.acceptance == "typical":
        limits = {"threshold": config.typical_threshold, "alpha": config.typical_alpha}
        node_B = accept_typical(tree, tokens_BM, logits_BMV, **limits)
    else:
        node_B = accept_exact(tree, tokens_BM, choice_BM)
    path_BP = jnp.asarray(tree.path_MQ)[node_B]
    count_B = jnp.minimum(jnp.asarray(tree.depth_M)[node_B] + 1, progress.left_B)
    stops_BP = jnp.isin(jnp.take_along_axis(tokens_BM, path_BP, axis=1), jnp.asarray(plan.stop_ids, jnp.int32))
    stops_BP &= jnp.arange(tree.height)[None] < count_B[:, None]
    stopped_B = jnp.any(stops_BP, axis=1)
    count_B = jnp.where(stopped_B, jnp.argmax(stops_BP, axis=1) + 1, count_B)
    # No choice is negative. Asking makes the commit wait until the step has read the state, also where there is nothing
    # to accept; otherwise XLA may order the two the other way round, and copies every cache at every step.
    count_B = jnp.where(progress.done_B | jnp.any(choice_BM < 0, axis=1), 0, count_B).astype(jnp.int32)
    return path_BP, count_B, stopped_B | (count_B == progress.left_B)


def _write(text_BX: Array, length_B: Array, tokens_BP: Array, count_B: Array) -> Int[Array, "B X"]:
    """The text with the first `count_B` of the tokens behind its first `length_B`."""
    B, X = text_BX.shape
    index_P = jnp.arange(tokens_BP.shape[1], dtype=jnp.int32)
    place_BP = jnp.where(index_P[None] < count_B[:, None], length_B[:, None] + index_P[None], X)
    return text_BX.at[jnp.arange(B)[:, None], place_BP].set(tokens_BP, mode="drop")
