"""How fast texts were generated."""

import time
from collections.abc import Iterator

from lin_jax.decode.text import Continuation


class Speed:
    """Tokens, steps and seconds of batches that `watch` let pass; printed as one line."""

    def __init__(self):
        self._tokens = self._steps = 0
        self._first: tuple[int, float] | None = None
        self._begin = time.perf_counter()
        self._end = self._begin

    def watch(self, batch: Iterator[list[Continuation]]) -> Iterator[list[Continuation]]:
        """The same blocks, counted; also those of a batch that is not awaited to its end."""
        tokens_before, steps_before = self._tokens, self._steps
        for rows in batch:
            self._tokens = tokens_before + sum(row.tokens for row in rows)
            self._steps = steps_before + sum(row.steps for row in rows)
            self._end = time.perf_counter()
            self._first = self._first or (self._tokens, self._end - self._begin)
            yield rows

    def __str__(self):
        """Tokens a second are those after the first block, which waits for compilation and prompts."""
        tokens, seconds = self._first or (0, 0.0)
        text = f"{self._tokens} tokens in {self._end - self._begin:.1f} s"
        if self._tokens > tokens:
            rate = (self._tokens - tokens) / (self._end - self._begin - seconds)
            text += f", the first {tokens} in {seconds:.1f} s, then {rate:.1f} tokens/s"
        return text + (f", {self._tokens / self._steps:.2f} tokens a step" if self._steps < self._tokens else "")
