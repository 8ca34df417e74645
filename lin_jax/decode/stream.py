"""Texts in pieces, as they come."""

import sys
from collections.abc import Iterator, Sequence

from lin_jax.decode.speed import Speed
from lin_jax.decode.text import Continuation, TextGenerator


def stream_texts(generator: TextGenerator, prompts: Sequence[str], speed: Speed) -> Iterator[str]:
    """All texts, prompts included but no sources, one after another with a blank line between them, in pieces.

    Raises:
        ConfigError: a prompt is empty or too long.
    """
    separator = ""
    for batch in generator.batches(prompts):
        number, shown = 0, 0
        for rows in speed.watch(batch):
            while number < len(rows):
                row = rows[number]
                text = row.prompt + settled(row, generator.config.stop)
                if row.done or len(text) > shown:
                    yield (separator if not shown else "") + text[shown:]
                shown = len(text)
                if not row.done:
                    break
                yield "\n"
                number, shown, separator = number + 1, 0, "\n"


def print_texts(generator: TextGenerator, prompts: Sequence[str]) -> None:
    """Texts on standard output as they come, and how fast they came on standard error."""
    speed = Speed()
    for piece in stream_texts(generator, prompts, speed):
        print(piece, end="", flush=True)
    print(speed, file=sys.stderr)


def settled(row: Continuation, stop: Sequence[str]) -> str:
    """Return the part of a text that may be shown: what later tokens leave as it is, without a stop string's start."""
    if row.done:
        return row.text
    text = row.text[: row.fixed]
    starts = [length for string in stop for length in range(1, len(string)) if text.endswith(string[:length])]
    return text[: len(text) - max(starts, default=0)]
