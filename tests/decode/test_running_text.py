"""What is shown of a text while it comes, put together, is the text; with every kind of tokenizer and stop strings."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lin_jax.data.tokenizers import BytesTokenizer, LibraryTokenizer
from lin_jax.decode.running_text import RunningText
from lin_jax.decode.stream import settled
from lin_jax.decode.text import Continuation


def with_fallback_bytes():
    """As LLaMA's: words with a mark for their space, and <0x00> to <0xFF> for what has no token."""
    tokens = ["</s>", "▁", "a", "b", "▁a", "b▁", "é"]
    vocabulary = {token: number for number, token in enumerate([*tokens, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("b", "▁")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return LibraryTokenizer(backend, end_id=0, begin_id=None)


def byte_level():
    """As GPT-2's: pieces of UTF-8, here of one or two bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(first, second) for first in alphabet[:200:9] for second in alphabet[1:200:9]]
    names = ["</s>", *alphabet, *(first + second for first, second in pairs)]
    backend = tokenizers.Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, pairs))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return LibraryTokenizer(backend, end_id=0, begin_id=None)


def with_words():
    """As BERT's: a space before every token that does not continue a word."""
    names = ["</s>", "a", "b", "##a", "##b", "."]
    backend = tokenizers.Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="a"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return LibraryTokenizer(backend, end_id=0, begin_id=None)


TOKENIZERS = {
    "bytes": BytesTokenizer(),
    "fallback bytes": with_fallback_bytes(),
    "byte level": byte_level(),
    "words": with_words(),
}


def shown_and_text(tokenizer, prompt, tokens, sizes, stop):
    """All that was shown while tokens came in pieces of these sizes, and the text that came out, with its tokens."""
    text, shown, count = RunningText(tokenizer, prompt, stop=stop, end_ids={tokenizer.end_id}), "", 0
    for size in [*sizes, len(tokens)]:
        count = min(count + size, len(tokens))
        text.read(tokens[:count])
        done = text.stopped or count == len(tokens)
        row = Continuation("", text.text, text.tokens, 1, done, text.fixed)
        piece = settled(row, stop)
        assert piece.startswith(shown), "what was shown stays"
        shown = piece
        if done:
            break
    return shown, text.text, text.tokens


def expected_text(tokenizer, prompt, tokens, stop):
    """By decoding all anew with every token: the first after which a stop string is there ends the text."""
    before = tokenizer.decode(prompt)
    for count in range(1, len(tokens) + 1):
        kept = [token for token in tokens[:count] if token != tokenizer.end_id]
        text = tokenizer.decode([*prompt, *kept])
        assert text.startswith(before)
        text = text[len(before) :]
        places = [text.find(string) for string in stop if string in text]
        if places:
            return text[: min(places)], count
    return text, len(tokens)


pieces = st.lists(st.integers(1, 5), max_size=12)
stops = st.lists(st.sampled_from(["a", "b a", "猫", "\ufffd", "é狗", "\n\n", "ab", "aba"]), max_size=2)


@hypothesis.settings(max_examples=150)
@hypothesis.given(data=st.data(), sizes=pieces, stop=stops)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_make_the_text(name, data, sizes, stop):
    tokenizer = TOKENIZERS[name]
    prompt = np.concatenate([tokenizer.encode("a"), tokenizer.encode(data.draw(st.sampled_from(["b", "a b", "ba"])))])
    # Whole characters often, any tokens now and then, so that bytes are cut off, missing and too many.
    texts = st.text(st.sampled_from("ab é猫狗😀\n."), max_size=4).map(lambda text: tokenizer.encode(text).tolist())
    any_tokens = st.lists(st.integers(0, tokenizer.vocabulary_size - 1), max_size=3)
    tokens = np.array(sum(data.draw(st.lists(st.one_of(texts, any_tokens), min_size=1, max_size=6)), []), np.int32)
    hypothesis.assume(len(tokens))
    # A text may only end with such a token.
    tokens = np.array([token for token in tokens[:-1] if token != tokenizer.end_id] + [tokens[-1]], np.int32)
    shown, text, count = shown_and_text(tokenizer, prompt, tokens, sizes, stop)
    assert shown == text
    assert (text, count) == expected_text(tokenizer, prompt, tokens, stop)


def test_characters_in_bytes_are_shown_once_and_when_they_are_sure():
    tokenizer = TOKENIZERS["fallback bytes"]
    tokens = tokenizer.encode("b猫狗😀b a")
    text = RunningText(tokenizer, tokenizer.encode("a"), stop=(), end_ids={0})
    shown = []
    for count in range(1, len(tokens) + 1):
        text.read(tokens[:count])
        shown.append(text.text[: text.fixed])
    # encode puts a space before a text. Ten bytes are one run, which the next token ends.
    assert list(dict.fromkeys(shown)) == [" ", " b", " b猫狗😀b", " b猫狗😀b a"] and len(tokens) == 14


def test_the_prompt_is_no_part_of_a_run_of_bytes():
    """A byte that breaks the run that a prompt ends with is broken alone."""
    tokenizer = TOKENIZERS["fallback bytes"]
    prompt, dog = tokenizer.encode("a猫"), tokenizer.encode("狗")[-3:]
    for tokens, expected in ((dog, "狗"), (dog[:2], "\ufffd\ufffd"), ([*dog, 4], "狗 a"), ([4], " a")):
        text = RunningText(tokenizer, prompt, stop=(), end_ids={0})
        text.read(np.array(tokens))
        assert text.text == expected


@pytest.mark.parametrize(
    ("text", "fixed", "done", "expected"),
    [
        ("one \ufffd\ufffd", 4, False, "one "),
        ("one \ufffd\ufffd", 4, True, "one \ufffd\ufffd"),
        ("a\ufffdb", 3, False, "a\ufffdb"),
        ("ends in th", 10, False, "ends in "),
        ("ends in th\ufffd", 10, False, "ends in "),
        ("ends in th", 10, True, "ends in th"),
        ("line\n", 5, False, "line"),
    ],
)
def test_what_may_still_change_is_held_back(text, fixed, done, expected):
    assert settled(Continuation("", text, 1, 1, done, fixed), ("the end", "\n\n")) == expected


def test_a_stop_string_may_begin_where_the_text_does():
    """Alone, the first token's space is not written: the text must be looked at behind its prompt."""
    backend = tokenizers.Tokenizer(models.BPE({"</s>": 0, "▁": 1, "a": 2, "x": 3}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = LibraryTokenizer(backend, end_id=0, begin_id=None)
    text = RunningText(tokenizer, np.array([1, 2]), stop=(" x",), end_ids={0})
    tokens = np.array([1, 3, 2], np.int32)
    assert tokenizer.decode(tokens) == "xa"
    text.read(tokens)
    assert (text.stopped, text.text, text.tokens) == (True, "", 2)
