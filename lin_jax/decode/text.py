"""Texts continued by a model: prompts in, prompts with their continuations out."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lin_jax.data.tokenizers import Tokenizer
from lin_jax.decode.generate import Generated, Generator
from lin_jax.models.language_model import LanguageModel
from lin_jax.models.medusa import MedusaHeads
from lin_jax.settings.base import require
from lin_jax.settings.generate import GenerateConfig, SamplingConfig


class Continuation(NamedTuple):
    """One text, as far as it is.

    Attributes:
        prompt: as it was given.
        text: what follows the prompt, without a token or string that ended it.
        tokens: generated, a token that ended the text included.
        steps: passes through the model that they took.
        done: whether the text has ended.
    """

    prompt: str
    text: str
    tokens: int
    steps: int
    done: bool


class TextGenerator:
    """A model with its tokenizer, prepared to continue texts."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, config: GenerateConfig, heads: MedusaHeads | None = None
    ):
        """Check what is asked for; Medusa heads are the model's own unless they are given.

        Raises:
            ConfigError: the settings do not fit the model, its heads or its tokenizer.
        """
        self.tokenizer, self.config = tokenizer, config
        self._ends = frozenset(stop_ids(tokenizer, config))
        heads = model.medusa if heads is None else heads
        self._generator = Generator(model, config, heads=heads, stop_ids=sorted(self._ends))

    def batches(self, prompts: Sequence[str]) -> Iterator[Iterator[list[Continuation]]]:
        """Batch after batch of `config.batch_size` texts: each prompt's samples, and then the next prompt's.

        Each batch is an iterator over what it holds after every `config.block` steps, the last time when all is done.

        Raises:
            ConfigError: a prompt is empty or too long.
        """
        ids = [self._encode(prompt, f"prompt {number}") for number, prompt in enumerate(prompts)]
        jobs = [(row, sample) for row in range(len(prompts)) for sample in range(self.config.samples)]
        size = min(self.config.batch_size, max(len(jobs), 1))
        for start in range(0, len(jobs), size):
            part = jobs[start : start + size]
            yield self._batch([prompts[row] for row, _ in part], [ids[row] for row, _ in part], part, size)

    def reply(self, tokens: np.ndarray) -> Iterator[Continuation]:
        """What follows one prompt of token ids, after every `config.block` steps.

        Raises:
            ConfigError: it is too long.
        """
        for [row] in self._batch([""], [tokens], [(0, 0)], 1):
            yield row

    def check(self, length: int) -> None:
        """Raise `ConfigError` for a prompt of so many tokens if that is too long for the model."""
        self._generator.needed(length)

    def length(self, prompt: str) -> int:
        """Tokens of a prompt; raises `ConfigError` if it is too long for the model."""
        length = len(self._encode(prompt, "the prompt"))
        self.check(length)
        return length

    def _batch(
        self, prompts: list[str], ids: list[np.ndarray], jobs: list[tuple[int, int]], size: int
    ) -> Iterator[list[Continuation]]:
        samples = [sample for _, sample in jobs]
        ends = lambda row, tokens: self._holds_stop(ids[row], tokens)  # noqa: E731
        for rows in self._generator.stream(ids, samples, rows=size, ends=ends):
            triples = zip(prompts, ids, rows, strict=True)
            yield [self._continuation(prompt, before, row) for prompt, before, row in triples]

    def _encode(self, prompt: str, name: str) -> np.ndarray:
        ids = self.tokenizer.encode(prompt)
        require(len(ids) > 0, f"{name} is empty: give some text to continue")
        begin = [] if self.tokenizer.begin_id is None else [self.tokenizer.begin_id]
        return np.concatenate([np.array(begin, np.int32), ids])

    def _holds_stop(self, before: np.ndarray, tokens: np.ndarray) -> bool:
        return bool(self.config.stop) and any(stop in self._text(before, tokens) for stop in self.config.stop)

    def _continuation(self, prompt: str, before: np.ndarray, row: Generated) -> Continuation:
        ended = len(row.tokens) and int(row.tokens[-1]) in self._ends
        text = self._text(before, row.tokens[:-1] if ended else row.tokens)
        places = [place for stop in self.config.stop if (place := text.find(stop)) >= 0]
        return Continuation(prompt, text[: min(places, default=None)], len(row.tokens), row.steps, row.done)

    def _text(self, before: np.ndarray, tokens: np.ndarray) -> str:
        """What the tokens add to the text of those before: some tokenizers write a token otherwise at the start."""
        prefix = self.tokenizer.decode(before)
        whole = self.tokenizer.decode(np.concatenate([before, tokens]))
        return whole[len(prefix) :] if whole.startswith(prefix) else self.tokenizer.decode(tokens)


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    heads: MedusaHeads | None = None,
    **settings: Any,
) -> list[str]:
    """Continue texts.

    Args:
        model: from `lin_jax.load`.
        tokenizer: from `lin_jax.load`.
        prompts: texts.
        heads: Medusa heads, for `draft="medusa"`; by default those that were loaded with the model.
        settings: fields of `GenerateConfig` and `SamplingConfig`, such as `max_new_tokens=200`, `temperature=0.8`,
            `draft="lookup"`.

    Returns:
        Each prompt with its continuation; with `samples=n`, n texts of the first prompt, then n of the second, ...

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
    sampling = SamplingConfig(**{name: value for name, value in settings.items() if name in sampling_names})
    return GenerateConfig(sampling=sampling, **{name: value for name, value in settings.items() if name in names})


def stop_ids(tokenizer: Tokenizer, config: GenerateConfig) -> Iterator[int]:
    """The tokens that end a text: a document's end, the beginning of another, and those of the settings."""
    yield tokenizer.end_id
    if tokenizer.begin_id is not None:
        yield tokenizer.begin_id
    for token in config.stop_tokens:
        number = tokenizer.token_id(token)
        require(number is not None, f"stop_tokens: the tokenizer has no token {token!r}")
        yield int(number or 0)
