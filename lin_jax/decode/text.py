"""Texts continued by a model: prompts in, prompts with their continuations out."""

import dataclasses
import functools
import hashlib
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lin_jax.data.pairs import encode_sources
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.decode.beams import BeamSearch
from lin_jax.decode.generate import Generator
from lin_jax.decode.running_text import RunningText
from lin_jax.models.base import Model, require_next_tokens
from lin_jax.models.medusa import MedusaHeads
from lin_jax.settings.base import require
from lin_jax.settings.generate import GenerateConfig, SamplingConfig
from lin_jax.settings.typed import is_unicode

# Values of the settings of sampling that leave out no token.
_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


class Continuation(NamedTuple):
    """One text, as far as it is.

    Attributes:
        prompt: what the text goes on from: as it was given, empty where it was a source.
        text: what follows the prompt, or a source's target, without a token or string that ended it.
        tokens: of the text, the one that ended it or completed a stop string included.
        steps: passes through the model, those between a stop string and the end of its block included.
        done: whether the text has ended.
        fixed: characters of `text` that further tokens leave as they are.
    """

    prompt: str
    text: str
    tokens: int
    steps: int
    done: bool
    fixed: int


class TextGenerator:
    """A model with its tokenizer, prepared to continue texts, or to write targets where it reads sources."""

    def __init__(self, model: Model, tokenizer: Tokenizer, config: GenerateConfig, heads: MedusaHeads | None = None):
        """Check what is asked for; Medusa heads are the model's own unless they are given.

        Raises:
            ConfigError: the settings do not fit the model, its heads or its tokenizer.
        """
        require_next_tokens(model, of_sources=True)
        self.tokenizer, self.config = tokenizer, config
        self._ends = frozenset(stop_ids(tokenizer, config))
        heads = model.medusa if heads is None else heads
        self._reads_source = model.reads_source
        make = BeamSearch if config.beams > 1 else Generator
        self._generator = make(model, config, heads=heads, stop_ids=sorted(self._ends))

    def batches(
        self, prompts: Sequence[str], numbers: Sequence[int] | None = None
    ) -> Iterator[Iterator[list[Continuation]]]:
        """Yield batch after batch of `config.batch_size` texts: each prompt's samples, and then the next prompt's.

        Each batch is an iterator over what it holds after every `config.block` steps, the last time when all is done.

        Args:
            prompts: texts.
            numbers: of the prompts, which decide their random numbers; by default 0, 1, ...

        Raises:
            ConfigError: a prompt is empty or too long.
        """
        ids = [self._encode(prompt, f"prompt {place}") for place, prompt in enumerate(prompts)]
        return self._batches([""] * len(ids) if self._reads_source else prompts, ids, numbers)

    def _batches(
        self, before: Sequence[str], ids: Sequence[np.ndarray], numbers: Sequence[int] | None
    ) -> Iterator[Iterator[list[Continuation]]]:
        numbers = range(len(ids)) if numbers is None else numbers
        jobs = ((row, sample) for row in range(len(ids)) for sample in range(self.config.samples))
        size = min(self.config.batch_size, max(len(ids) * self.config.samples, 1))
        while part := list(itertools.islice(jobs, size)):
            rows = [row for row, _ in part]
            of_rows = [(numbers[row], sample) for row, sample in part]
            yield self._batch([before[row] for row in rows], [ids[row] for row in rows], of_rows, size)

    def write(self, prompts: Sequence[np.ndarray], numbers: Sequence[int] | None = None) -> Iterator[Continuation]:
        """Yield what follows each prompt of token ids, or the target of each source, in their order.

        Args:
            prompts: token ids.
            numbers: see `batches`.

        Raises:
            ConfigError: a prompt is empty or too long.
        """
        for batch in self._batches([""] * len(prompts), prompts, numbers):
            *_, last = batch
            yield from last

    def reply(self, tokens: np.ndarray) -> Iterator[Continuation]:
        """Yield what follows one prompt of token ids, after every `config.block` steps.

        Raises:
            ConfigError: it is too long.
        """
        for [row] in self._batch([""], [tokens], [(0, 0)], 1):
            yield row

    def check(self, length: int, texts: int = 1) -> None:
        """Raise `ConfigError` if a prompt of so many tokens is too long for the model, or for so many in the memory."""
        self._generator.capacity(length, min(self.config.batch_size, texts))

    def length(self, prompt: str) -> int:
        """Return the tokens of a prompt; raise `ConfigError` if it is too long for the model."""
        length = len(self._encode(prompt, "the prompt"))
        self.check(length)
        return length

    def fingerprint(self) -> str:
        """Return a checksum of all that decides a text besides settings and prompt: the model and the tokenizer."""
        found = hashlib.sha256(self._generator.fingerprint().encode())
        with tempfile.TemporaryDirectory() as directory:
            self.tokenizer.save(directory)
            for file in sorted(Path(directory).iterdir()):
                found.update(file.read_bytes())
        return found.hexdigest()[:32]

    def _batch(
        self, prompts: list[str], ids: list[np.ndarray], jobs: list[tuple[int, int]], size: int
    ) -> Iterator[list[Continuation]]:
        make_text = functools.partial(RunningText, self.tokenizer, stop=self.config.stop, end_ids=self._ends)
        # A target does not go on where its source ends.
        texts = [make_text(before[:0] if self._reads_source else before) for before in ids]

        def has_stopped(row: int, tokens: np.ndarray) -> bool:
            texts[row].read(tokens)
            return texts[row].stopped

        numbers, samples = [number for number, _ in jobs], [sample for _, sample in jobs]
        for rows in self._generator.stream(ids, samples, numbers=numbers, rows=size, ends=has_stopped):
            for text, row in zip(texts, rows, strict=True):
                text.read(row.tokens)
            triples = zip(prompts, texts, rows, strict=True)
            yield [
                Continuation(prompt, text.text, text.tokens, row.steps, row.done, text.fixed)
                for prompt, text, row in triples
            ]

    def _encode(self, prompt: str, name: str) -> np.ndarray:
        require(is_unicode(prompt), f"{name} is not UTF-8")
        ids = self.tokenizer.encode(prompt)
        require(len(ids) > 0, f"{name} is empty: give some text to continue")
        if self._reads_source:
            return encode_sources([prompt], self.tokenizer)[0]
        begin = [] if self.tokenizer.begin_id is None else [self.tokenizer.begin_id]
        return np.concatenate([np.array(begin, np.int32), ids])


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    heads: MedusaHeads | None = None,
    **settings: Any,
) -> list[str]:
    """Continue texts, or write the targets of sources where the model is an encoder-decoder.

    Args:
        model: from `lin_jax.load`.
        tokenizer: from `lin_jax.load`.
        prompts: texts, or sources.
        heads: Medusa heads, for `draft="medusa"`; by default those that were loaded with the model.
        settings: fields of `GenerateConfig` and `SamplingConfig`, such as `max_new_tokens=200`, `temperature=0.8`,
            `draft="lookup"`.

    Returns:
        Each prompt with its continuation, or each source's target alone; with `samples=n`, n texts of the first
        prompt, then n of the second, ...

    Raises:
        ConfigError: a setting or a prompt is wrong.
    """
    require(not isinstance(prompts, str), "prompts must be a list of texts, but is one text: put it in a list")
    generator = TextGenerator(model, tokenizer, make_config(settings), heads)
    texts = []
    for batch in generator.batches(prompts):
        *_, last = batch
        texts += [row.prompt + row.text for row in last]
    return texts


def make_config(settings: dict[str, Any]) -> GenerateConfig:
    """The settings of `GenerateConfig` and `SamplingConfig` in one; raises `ConfigError` for one that is in neither."""
    sampling_names = {field.name for field in dataclasses.fields(SamplingConfig)}
    names = {field.name for field in dataclasses.fields(GenerateConfig)} - {"sampling"}
    unknown = sorted(settings.keys() - names - sampling_names)
    require(not unknown, f"unknown setting {', '.join(unknown)}; there are {', '.join(sorted(names | sampling_names))}")
    _refuse_ignored(settings)
    sampling = SamplingConfig(**{name: value for name, value in settings.items() if name in sampling_names})
    return GenerateConfig(sampling=sampling, **{name: value for name, value in settings.items() if name in names})


def _refuse_ignored(settings: dict[str, Any]) -> None:
    """Raise `ConfigError` for a setting that was given and changes nothing beside the others."""
    draft, acceptance = settings.get("draft", "none"), settings.get("acceptance", "exact")
    changes_nothing = {
        "is for draft=medusa": (draft != "medusa", ("tree",)),
        "is for draft=lookup": (draft != "lookup", ("lookup_tokens", "lookup_match")),
        "is for beams=2 and more": (settings.get("beams", 1) == 1, ("length_penalty",)),
        "is for acceptance=typical": (acceptance != "typical", ("typical_threshold", "typical_alpha")),
        "changes nothing without guesses: give a draft": (draft == "none" and acceptance != "exact", ("acceptance",)),
        "changes nothing at temperature=0, which takes the likeliest token: give a temperature": (
            settings.get("temperature", 0) == 0,
            [name for name in ("top_k", "top_p", "min_p") if settings.get(name) != _OFF[name]],
        ),
    }
    for why, (holds, names) in changes_nothing.items():
        given = [name for name in names if name in settings]
        require(not (holds and given), f"{', '.join(given)} {why}")


def stop_ids(tokenizer: Tokenizer, config: GenerateConfig) -> Iterator[int]:
    """The tokens that end a text: the tokenizer's ends, the beginning of another, and those of the settings."""
    yield from tokenizer.end_ids
    if tokenizer.begin_id is not None:
        yield tokenizer.begin_id
    for token in config.stop_tokens:
        number = tokenizer.token_id(token)
        require(number is not None, f"stop_tokens: the tokenizer has no token {token!r}")
        yield int(number or 0)
