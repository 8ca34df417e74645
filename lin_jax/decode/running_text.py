"""The text of tokens as they come: which part of it further tokens cannot change, and where a stop string is."""

from collections.abc import Container, Sequence

import numpy as np

from lin_jax.data.tokenizers import Tokenizer

# What decoding gives for bytes that are no whole character (yet).
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class RunningText:
    """What the tokens that follow a prompt add to its text.

    It depends on the tokens alone, and not on how many of them come at a time.

    Attributes:
        tokens: how many were read, the last of which ends the text or completes a stop string if any does.
        stopped: whether a stop string is there.
        text: of the tokens read, without a token that ends it and without all from a stop string on.
        fixed: characters of `text` that further tokens leave as they are.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, *, stop: Sequence[str], end_ids: Container[int]):
        """Begin behind a prompt, which may be empty.

        Args:
            tokenizer: decodes.
            prompt: token ids; the last is decoded too, as some tokenizers write the first token of a text otherwise.
            stop: strings before which the text ends.
            end_ids: tokens that end it.
        """
        self._tokenizer, self._stop, self._end_ids = tokenizer, tuple(stop), end_ids
        self._before = [int(token) for token in prompt[-1:]]
        # Tokens whose text may still change: bytes of a character.
        self._open: list[int] = []
        self.tokens, self.stopped, self.text, self.fixed = 0, False, "", 0

    def read(self, tokens: np.ndarray) -> None:
        """Go on to `tokens`, all that follow the prompt; those that were read before are not looked at again."""
        new = [int(token) for token in tokens[self.tokens :]]
        # Only a stop string may be there with one token and not with the next.
        size = 1 if self._stop else max(len(new), 1)
        for start in range(0, len(new), size):
            if self.stopped:
                return
            part = new[start : start + size]
            self.tokens += len(part)
            self._add([token for token in part if token not in self._end_ids])

    def _add(self, tokens: list[int]) -> None:
        if not tokens:
            return
        self._open += tokens
        searched = max(0, self.fixed - max(map(len, self._stop), default=0))
        self.text = self.text[: self.fixed] + self._decode_open()
        places = [place for stop in self._stop if (place := self.text.find(stop, searched)) >= 0]
        if places:
            self.stopped, self.text = True, self.text[: min(places)]
        elif not self._tokenizer.is_fallback_byte(tokens[-1]) and not self.text.endswith(_BROKEN):
            self._before, self._open, self.fixed = tokens[-1:], [], len(self.text)

    def _decode_open(self) -> str:
        """Return what the open tokens add to the text of the one before them."""
        is_byte = self._tokenizer.is_fallback_byte
        # The prompt stays as it is: its last bytes and the first that follow make no run.
        context = [] if all(map(is_byte, self._before)) and is_byte(self._open[0]) else self._before
        before = self._tokenizer.decode(context)
        whole = self._tokenizer.decode([*context, *self._open])
        return whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(self._open)
