"""Tokenizers: bytes, a byte-level BPE learned from the corpus, and those of Hugging Face.

A tokenizer is saved in every checkpoint, in full, so that nothing else is needed to read it back: `tokenizer.json` in
the format of the `tokenizers` library (not for bytes), and `tokenizer_info.json`, which says what kind it is.
"""

import abc
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from lin_jax.data.examples import TRAIN, open_examples, open_pairs
from lin_jax.data.sources import open_source
from lin_jax.paths import check_remote, copy_directory, is_remote, write_whole
from lin_jax.settings.base import ConfigError, first_line, require
from lin_jax.settings.data import DataConfig
from lin_jax.settings.foreign import read_object
from lin_jax.settings.typed import shown

END_OF_DOCUMENT = "<|endoftext|>"
# More text changes the merges of a learned vocabulary little.
TRAINING_CHARACTERS = 1 << 26
_INFO = "tokenizer_info.json"
_LIBRARY_FILE = "tokenizer.json"
_FALLBACK_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
# Each is a whole tokenizer. Without one, transformers would make an empty one instead of an error.
_WHOLE_SETS = ((_LIBRARY_FILE,), *_GPT2_FILES, *((name,) for name in ("tokenizer.model", "spiece.model", "vocab.txt")))
# Sentencepiece's own files, which only its library reads.
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
# How byte fallback spells bytes, which no merge takes up.
_BYTE = re.compile("<0x[0-9A-F]{2}>")
# How sentencepiece and byte-level tokenizers spell a space.
_SPACES = ("\u2581", "\u0120")
# Most characters that are cut off to see whether a border is still one.
_LARGEST_MARGIN = 256
# Texts that are tried to see what a tokenizer puts before one.
_PROBES = 16
# What says which tokens end a text; the first file that does decides, as in transformers.
_END_FILES = ("generation_config.json", "config.json")


class Tokenizer(abc.ABC):
    """Text to token ids and back. Nothing in a text stands for a special token.

    Attributes:
        vocabulary_size: all ids are below it.
        end_id: the token that ends a document.
        begin_id: the token that the tokenizer itself puts before a text; None where it puts none, even if there is a
            token of that name. What it may put after a text is not asked for: documents end with `end_id`, and a text
            to be continued has no end yet.
        end_ids: the tokens that end a text which is generated: `end_id`, and those that the model's files list.
    """

    vocabulary_size: int
    end_id: int
    begin_id: int | None
    end_ids: tuple[int, ...]

    @property
    def start_id(self) -> int:
        """The token from which the first one of a document is predicted: `begin_id`, or else `end_id`."""
        return self.end_id if self.begin_id is None else self.begin_id

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32, without tokens for its beginning and end."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each text."""
        return [self.encode(text) for text in texts]

    @abc.abstractmethod
    def border(self, text: str, position: int, reach: int) -> int | None:
        """Return the place nearest to a position where a text's tokens on both sides do not depend on each other.

        Args:
            text: a part of a longer one, of which what lies far from the position may be cut off anywhere.
            position: in characters.
            reach: how far from it the place may be.

        Returns:
            The character that the token after the border begins with; None where there is no border.
        """

    @abc.abstractmethod
    def encode_between(self, text: str, start: int, stop: int) -> tuple[np.ndarray, int, int]:
        """Return the tokens of a text, and which of them lie between two borders: the first, and that after the last.

        Args:
            text: a part of a longer one.
            start: a border of it, or 0 for all from the beginning.
            stop: another, or the length of the text for all to its end.
        """

    @abc.abstractmethod
    def encode_examples(
        self, first: Sequence[str], second: Sequence[str] | None, length: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the token ids and token types, int32, of texts, or of pairs of texts, that a model is to read whole.

        The tokenizer's own special tokens stand around and between them. What is longer than `length` loses tokens at
        its end, one at a time, always of the text that is the longer one then.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int | np.integer] | np.ndarray) -> str:
        """The text of token ids."""

    @abc.abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token, special or not, by its name in the vocabulary; None where there is none."""

    def word_beginnings(self) -> np.ndarray:
        """Return for each token whether a word begins with it, by how tokens are spelled, bool [V].

        Raises:
            ConfigError: that does not tell.
        """
        raise ConfigError("the tokenizer does not mark where words begin: set finetune.whole_words=False")

    def is_fallback_byte(self, token: int) -> bool:
        """Return whether a token is a byte whose neighbours, if they are bytes too, decide what it decodes to.

        A run of such bytes decodes to its characters if all of it is UTF-8, and else to U+FFFD for each byte; so what
        the beginning of a run decodes to is known only where the run ends.
        """
        return False

    @abc.abstractmethod
    def save(self, directory: epath.PathLike) -> None:
        """Write all of the tokenizer to a directory, local or remote."""


class BytesTokenizer(Tokenizer):
    """The bytes of UTF-8, and 256 for the end of a document."""

    vocabulary_size = 257
    end_id = 256
    begin_id = None
    end_ids = (256,)

    def encode(self, text: str) -> np.ndarray:
        """The bytes of a text, int32."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def border(self, text: str, position: int, reach: int) -> int:
        """Return the position: no byte depends on another."""
        return position

    def encode_between(self, text: str, start: int, stop: int) -> tuple[np.ndarray, int, int]:
        """Return the bytes of a text, and where a part of it begins and ends among them."""
        first = len(text[:start].encode())
        return self.encode(text), first, first + len(text[start:stop].encode())

    def encode_examples(
        self, first: Sequence[str], second: Sequence[str] | None, length: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the bytes of texts, those of a pair one after another, with types 0 and 1."""
        found = []
        for a, b in zip(first, second if second is not None else itertools.repeat(""), strict=second is not None):
            parts = [self.encode(a), self.encode(b)]
            sizes = longest_first(len(parts[0]), len(parts[1]), length)
            parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
            found.append((np.concatenate(parts), np.repeat(np.arange(2, dtype=np.int32), sizes)))
        return found

    def decode(self, ids: Sequence[int | np.integer] | np.ndarray) -> str:
        """The text of bytes; ends of documents are left out."""
        return bytes(int(token) for token in ids if token < 256).decode(errors="replace")

    def token_id(self, token: str) -> int | None:
        """The byte of a character of ASCII."""
        return ord(token) if len(token) == 1 and token.isascii() else None

    def save(self, directory: epath.PathLike) -> None:
        """Write what kind of tokenizer it is."""
        _write_files(directory, {_INFO: json.dumps({"kind": "bytes"})})


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, end_id: int, begin_id: int | None, end_ids: Sequence[int] = ()
    ):
        """Take over `backend`, turning off what would change a text: truncation, padding, special tokens."""
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._cut: dict[int, tokenizers.Tokenizer] = {}
        self._has_fallback_bytes = '"ByteFallback"' in json.dumps(json.loads(backend.to_str()).get("decoder"))
        self.end_id = end_id
        self.begin_id = begin_id
        model = backend.model
        marks = [getattr(model, name, None) for name in ("continuing_subword_prefix", "end_of_word_suffix")]
        # Whether tokens are made by merging and spelled without marks of their place in a word. A unigram model chooses
        # between equally likely ones by the rounding of a sum over all of a word.
        self._merges = isinstance(model, models.BPE) and not any(marks)
        self._neighbours: set[tuple[str, str]] | None = None
        self.end_ids = tuple(dict.fromkeys((end_id, *end_ids)))
        self.vocabulary_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32."""
        # Without offsets, which take time.
        return np.array(_encoding(self._backend.encode_batch_fast, text).ids, np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of texts, on all cores."""
        return [np.array(encoding.ids, np.int32) for encoding in _encodings(self._backend.encode_batch_fast, texts)]

    def border(self, text: str, position: int, reach: int) -> int | None:
        """Return the nearest border that is one whether or not the ends of the text are cut off."""
        before, after = (_margin(size) for size in (position, len(text) - position))
        whole, inner = self._borders(text), self._borders(text[before : len(text) - after])
        found = whole & {(at + before, *tokens) for at, *tokens in inner}
        near = (at for at, *_ in found if abs(at - position) <= reach)
        return min(near, key=lambda at: (abs(at - position), at), default=None)

    def _borders(self, text: str) -> set[tuple[int, int, int]]:
        """Where tokens on both sides do not depend on each other, with the tokens on both sides.

        Two words, as the tokenizer splits a text, never do. Where the tokens of a word are made by merging, none
        reaches across two characters that stand beside each other in no token.
        """
        encoding = _encoding(self._backend.encode_batch, text)
        pairs = itertools.pairwise(zip(encoding.ids, encoding.tokens, encoding.offsets, encoding.word_ids, strict=True))
        return {
            (begin, id_before, id_after)
            for (id_before, before, (start, end), word), (id_after, after, (begin, _), other) in pairs
            if start < begin and end <= begin and (word != other or self._never_meet(before, after))
        }

    def _never_meet(self, before: str, after: str) -> bool:
        """Whether no token holds the last character of one beside the first of another."""
        if not self._merges:
            return False
        if self._neighbours is None:
            vocabulary = self._backend.get_vocab(with_added_tokens=False)
            self._neighbours = {pair for token in vocabulary for pair in itertools.pairwise(token)}
        last, first = (before, after) if _BYTE.fullmatch(before) or _BYTE.fullmatch(after) else (before[-1:], after[:1])
        return (last, first) not in self._neighbours

    def encode_between(self, text: str, start: int, stop: int) -> tuple[np.ndarray, int, int]:
        """Return the tokens of a text, and which of them lie between two borders."""
        encoding = _encoding(self._backend.encode_batch, text)
        begins = np.array([begin for begin, _ in encoding.offsets], np.int64)
        first = 0 if start == 0 else int(np.searchsorted(begins, start))
        beyond = len(begins) if stop == len(text) else int(np.searchsorted(begins, stop))
        return np.array(encoding.ids, np.int32), first, beyond

    def encode_examples(
        self, first: Sequence[str], second: Sequence[str] | None, length: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return ids and types as the tokenizer's own post-processor makes them; without one, pairs are joined."""
        backend = self._cut_to(length)
        inputs = list(first) if second is None else list(zip(first, second, strict=True))
        try:
            encodings = backend.encode_batch(inputs, add_special_tokens=True)
        except Exception as error:  # the library raises Exception itself
            raise _no_room(length, first_line(error)) from error
        # Without an error the library may leave the special tokens of a text alone where there is no room for these.
        needed = max((len(found.ids) for found in encodings), default=0)
        if needed > length:
            raise _no_room(length, f"there are {needed}")
        return [(np.array(found.ids, np.int32), np.array(found.type_ids, np.int32)) for found in encodings]

    def _cut_to(self, length: int) -> tokenizers.Tokenizer:
        """Return the tokenizer with truncation, which belongs to a copy of its own."""
        if length not in self._cut:
            backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
            backend.encode_special_tokens = True
            try:
                backend.enable_truncation(length, strategy="longest_first")
            except Exception as error:  # the library raises Exception itself
                raise _no_room(length, first_line(error)) from error
            self._cut[length] = backend
        return self._cut[length]

    def decode(self, ids: Sequence[int | np.integer] | np.ndarray) -> str:
        """The text of token ids, special tokens included."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, such as </s>."""
        return self._backend.token_to_id(token)

    def word_beginnings(self) -> np.ndarray:
        """Return what the marks tell: ## at what continues a word, or a space at what begins one."""
        names = [self._backend.id_to_token(token) or "" for token in range(self.vocabulary_size)]
        prefix = getattr(self._backend.model, "continuing_subword_prefix", None)
        if prefix:
            return np.array([not name.startswith(prefix) for name in names])
        space = next((mark for mark in _SPACES if any(name.startswith(mark) for name in names)), None)
        return super().word_beginnings() if space is None else np.array([name.startswith(space) for name in names])

    def is_fallback_byte(self, token: int) -> bool:
        """Return whether a token is a byte, such as <0xE7>, or no token at all, which decoding leaves out of a run."""
        if not self._has_fallback_bytes:
            return False
        name = self._backend.id_to_token(int(token))
        return name is None or _FALLBACK_BYTE.fullmatch(name) is not None

    def save(self, directory: epath.PathLike) -> None:
        """Write the tokenizer in the library's own format."""
        info = {"kind": "tokenizers", "end_id": self.end_id, "begin_id": self.begin_id, "end_ids": self.end_ids}
        _write_files(directory, {_LIBRARY_FILE: self._backend.to_str(), _INFO: json.dumps(info)})


def longest_first(first: int, second: int, length: int) -> tuple[int, int]:
    """Return how much of two texts is kept where tokens are taken from the longer one until `length` are left."""
    if first + second <= length:
        return first, second
    # The shorter one stays whole while it is no more than half; else both have half, the first one token more.
    short = min(first, second, length // 2)
    if min(first, second) == short:
        return (short, length - short) if first <= second else (length - short, short)
    return length - length // 2, length // 2


def _no_room(length: int, why: str) -> ConfigError:
    return ConfigError(f"data.sequence_length={length} has no room for the tokenizer's special tokens: {why}")


def _encoding(encode: Callable[..., list[tokenizers.Encoding]], text: str) -> tokenizers.Encoding:
    """Return the encoding of a text by a method for several, which, unlike that for one, lets other threads run.

    Raises:
        ConfigError: see `_encodings`.
    """
    return _encodings(encode, [text])[0]


def _encodings(encode: Callable[..., list[tokenizers.Encoding]], texts: Sequence[str]) -> list[tokenizers.Encoding]:
    """Return the encodings of texts.

    Raises:
        ConfigError: a pattern of the tokenizer tries more ways to match a text than its library allows.
    """
    try:
        return encode(list(texts), add_special_tokens=False)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # The library's own, of no module that could be imported.
            raise
        told = shown(texts[0]) if len(texts) == 1 else f"one of {len(texts)} texts"
        raise ConfigError(f"the tokenizer fails at {told}: {first_line(error)}") from error


def load_tokenizer(config: DataConfig, cache_directory: epath.PathLike) -> Tokenizer:
    """The tokenizer that the settings mean; a learned one is kept in `cache_directory`, and read from there again.

    Raises:
        ConfigError: it can't be had; the message says what to do.
    """
    if config.tokenizer == "bytes":
        return BytesTokenizer()
    if config.tokenizer == "train":
        return _learned(config, epath.Path(cache_directory))
    if is_remote(config.tokenizer):
        return _remote(config)
    directory = os.path.expanduser(config.tokenizer)
    if os.path.isdir(directory):
        _require_whole_set(directory)
        for vocabulary, merges in _GPT2_FILES:
            paths = os.path.join(directory, vocabulary), os.path.join(directory, merges)
            if all(map(os.path.isfile, paths)) and not os.path.isfile(os.path.join(directory, _LIBRARY_FILE)):
                return _gpt2(*paths, _listed_ends(directory))
        return _hugging_face(directory, f"data.tokenizer: no tokenizer can be read from {config.tokenizer}")
    return _hugging_face(
        config.tokenizer,
        f"data.tokenizer: {config.tokenizer} is no directory and cannot be had from the Hugging Face Hub; give bytes, "
        "train, or a directory with tokenizer.json",
    )


def restore_tokenizer(directory: epath.PathLike) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote.

    Raises:
        ConfigError: the directory holds none, or a damaged one.
    """
    directory = epath.Path(directory)
    try:
        info = json.loads((directory / _INFO).read_text(encoding="utf-8"))
        if info["kind"] == "bytes":
            return BytesTokenizer()
        backend = tokenizers.Tokenizer.from_str((directory / _LIBRARY_FILE).read_text(encoding="utf-8"))
        known = {name: info[name] for name in ("end_id", "begin_id")}
        return LibraryTokenizer(backend, **known, end_ids=info.get("end_ids", ()))
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(f"no tokenizer can be read from {directory}: {first_line(error)}") from error


def _write_files(directory: epath.PathLike, texts: dict[str, str]) -> None:
    """Write files one after another, each whole or not at all."""
    for name, text in texts.items():
        write_whole(epath.Path(directory) / name, text.encode())


def _remote(config: DataConfig) -> Tokenizer:
    """The tokenizer in a remote directory, whose libraries read local files only."""
    check_remote(config.tokenizer, "data.tokenizer")
    require(epath.Path(config.tokenizer).is_dir(), f"data.tokenizer: {config.tokenizer} is no directory")
    with tempfile.TemporaryDirectory() as copy:
        copy_directory(config.tokenizer, copy)
        return load_tokenizer(dataclasses.replace(config, tokenizer=copy), copy)


def _learned(config: DataConfig, directory: epath.Path) -> Tokenizer:
    least = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    require(
        config.tokenizer_vocabulary >= least,
        f"data.tokenizer_vocabulary must be at least {least} (all bytes and the end of a document), "
        f"but is {config.tokenizer_vocabulary}",
    )
    if not (directory / _INFO).exists():
        _learn(config).save(directory)
    tokenizer = restore_tokenizer(directory)
    require(
        tokenizer.vocabulary_size <= config.tokenizer_vocabulary,
        f"{directory} holds a tokenizer of {tokenizer.vocabulary_size} tokens, but data.tokenizer_vocabulary is "
        f"{config.tokenizer_vocabulary}; use another directory",
    )
    return tokenizer


def _learn(config: DataConfig) -> LibraryTokenizer:
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=config.tokenizer_vocabulary,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_sample(config), trainer)
    end_id = 0  # the trainer numbers special tokens first
    return LibraryTokenizer(backend, end_id=end_id, begin_id=None)


def _sample(config: DataConfig) -> Iterator[str]:
    """Training text in a random order, up to `TRAINING_CHARACTERS`."""
    left = TRAINING_CHARACTERS
    for text in _training_texts(config):
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _training_texts(config: DataConfig) -> Iterator[str]:
    if config.source not in ("glue", "table"):
        yield from grain.MapDataset.source(open_source(config, "train")).shuffle(seed=0)
        return
    examples: Any = open_pairs(config, TRAIN) if config.target_field else open_examples(config, TRAIN)
    shuffled = examples.take(np.random.default_rng(0).permutation(len(examples)))
    for texts in zip(*filter(None, (shuffled.first, shuffled.second)), strict=True):
        yield from texts


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt2(vocabulary: str, merges: str, listed_ends: Sequence[int]) -> LibraryTokenizer:
    try:
        backend = _byte_level(models.BPE.from_file(vocabulary, merges))
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(f"data.tokenizer: cannot read {vocabulary} and {merges}: {first_line(error)}") from error
    end_id = backend.token_to_id(END_OF_DOCUMENT)
    if end_id is None:
        raise ConfigError(f"data.tokenizer: {vocabulary} has no token {END_OF_DOCUMENT} to end documents with")
    backend.add_special_tokens([END_OF_DOCUMENT])
    return LibraryTokenizer(backend, end_id=end_id, begin_id=None, end_ids=listed_ends)


def _margin(size: int) -> int:
    """Characters to cut off from so many; no multiple of 2 or 3, so that groups of digits begin elsewhere after it."""
    most = min(size // 4, _LARGEST_MARGIN)
    return most - most % 6 + 1 if most >= 6 else most


def _require_whole_set(directory: str) -> None:
    """Raise `ConfigError` for a directory without all files of a tokenizer, or what is needed to read them."""
    held = set(os.listdir(directory))
    found = next((files for files in _WHOLE_SETS if held.issuperset(files)), None)
    if found is not None:
        readable = found[0] not in _SENTENCEPIECE_FILES or importlib.util.find_spec("sentencepiece") is not None
        require(readable, f"data.tokenizer: {directory}/{found[0]} needs sentencepiece: pip install sentencepiece")
        return
    lacking = [name for files in _WHOLE_SETS if held.intersection(files) for name in files if name not in held]
    told = f"lacks {', '.join(lacking)}" if lacking else f"has no {', no '.join(map(' with '.join, _WHOLE_SETS))}"
    raise ConfigError(f"data.tokenizer: no tokenizer can be read from {directory}, which {told}; give one that does")


def _hugging_face(name: str, problem: str) -> LibraryTokenizer:
    import transformers

    try:
        found: Any = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        backend = tokenizers.Tokenizer.from_str(found.backend_tokenizer.to_str())
    except Exception as error:  # whatever the files of others hold
        raise ConfigError(f"{problem} ({first_line(error)})") from error
    ordinary = backend.get_vocab(with_added_tokens=True).keys() - set(found.all_special_tokens)
    require(bool(ordinary), f"{problem} (it knows no tokens but special ones)")
    end_id = found.eos_token_id if found.eos_token_id is not None else found.sep_token_id
    require(end_id is not None, f"data.tokenizer: {name} has neither eos_token nor sep_token to end documents with")
    before = _put_before(backend, ["a", *sorted(ordinary)[:_PROBES]])
    require(
        len(before) < 2, f"data.tokenizer: {name} puts {len(before)} tokens before a text; at most one is supported"
    )
    ends = _listed_ends(name) if os.path.isdir(name) else []
    return LibraryTokenizer(backend, end_id=end_id, begin_id=next(iter(before), None), end_ids=ends)


def _put_before(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[int]:
    """The tokens that a tokenizer itself puts before a text, the first of `texts` that has tokens of its own."""
    for text in texts:
        encoding = backend.encode(text, add_special_tokens=True)
        own = [at for at, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
        if own:
            return encoding.ids[: own[0]]
    return []


def _listed_ends(directory: str) -> list[int]:
    """The tokens that end a text by the files of a model, which may list more than its tokenizer's end."""
    for name in _END_FILES:
        file = os.path.join(directory, name)
        if not os.path.exists(file):
            continue
        fields = read_object(file)
        found: int | list[int] = fields.get("eos_token_id", int | list[int], [])
        ends = [found] if isinstance(found, int) else found
        fields.require(all(end >= 0 for end in ends), f"eos_token_id must be 0 or more, but is {found}")
        if ends:
            return ends
    return []
