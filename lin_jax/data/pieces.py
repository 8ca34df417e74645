"""Tokens of documents that are read in pieces: those of the whole document, whatever its tokenizer.

A tokenizer reads a piece otherwise than as a part of its document: sentencepiece puts a space before every text, a
pattern that splits a text into words looks ahead, and a word may lie across the cut. So a piece is tokenised together
with some text before and after it, and of the tokens those between two borders are its own. A border is a place near
the end of a piece where the tokens on both sides do not depend on each other, see `Tokenizer.border`. The pieces on
both sides find the same one, since they look at the same text.
"""

import numpy as np

from lin_jax.data.sources import Source
from lin_jax.data.tokenizers import Tokenizer

# Characters on either side of a cut that are looked at. A border lies within half of them, so that each side has the
# other half at least beyond it; the smallest piece has several times as many.
CONTEXT = 2048


def tokens_of_piece(source: Source, tokenizer: Tokenizer, index: int) -> tuple[np.ndarray, int | None]:
    """Return the tokens of a document that belong to one of its pieces, and the one before them.

    Where there is no border at the end of a piece, as in a word of thousands of letters, what follows belongs to it up
    to the next border, and pieces without any have no tokens.

    Returns:
        Token ids, int32, which are those of the whole document if the ids of all its pieces are put together; and the
        token before the first of them, None at the beginning of the document.
    """
    begins = index == 0 or source.ends(index - 1)
    text = last = source[index]
    if begins and source.ends(index):
        return tokenizer.encode(text), None
    before = "" if begins else source[index - 1][-CONTEXT:]
    start = 0 if begins else _border(tokenizer, before, text)
    if start is None:
        return np.empty(0, np.int32), _last_token(tokenizer, before + text)
    stop, after = None, ""
    while stop is None and not source.ends(index):
        index += 1
        following = source[index]
        stop = _border(tokenizer, last, following)
        if stop is None:
            text, last = text + following, following
        else:
            stop, after = len(text) + stop, following[:CONTEXT]
    window = before + text + after
    end = len(window) if stop is None else len(before) + stop
    ids, first, beyond = tokenizer.encode_between(window, len(before) + start if before else 0, end)
    return ids[first:beyond], int(ids[first - 1]) if first else None


def _border(tokenizer: Tokenizer, left: str, right: str) -> int | None:
    """The border near the cut between two pieces, in characters after it, which may be negative."""
    left, right = left[-CONTEXT:], right[:CONTEXT]
    found = tokenizer.border(left + right, len(left), CONTEXT // 2)
    return None if found is None else found - len(left)


def _last_token(tokenizer: Tokenizer, text: str) -> int | None:
    ids = tokenizer.encode(text)
    return int(ids[-1]) if len(ids) else None
