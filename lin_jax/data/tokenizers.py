"""Tokenizers: bytes, a byte-level BPE learned from the corpus, and those of Hugging Face.

A tokenizer is saved in every checkpoint, in full, so that nothing else is needed to read it back: `tokenizer.json` in
the format of the `tokenizers` library (not for bytes), and `tokenizer_info.json`, which says what kind it is.
"""

import abc
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from lin_jax.data.sources import open_source
from lin_jax.paths import check_remote, copy_directory, is_remote, write_whole
from lin_jax.settings.base import ConfigError, first_line, require
from lin_jax.settings.data import DataConfig

END_OF_DOCUMENT = "<|endoftext|>"
# More text changes the merges of a learned vocabulary little.
TRAINING_CHARACTERS = 1 << 26
_INFO = "tokenizer_info.json"
_LIBRARY_FILE = "tokenizer.json"
_FALLBACK_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


class Tokenizer(abc.ABC):
    """Text to token ids and back. Nothing in a text stands for a special token.

    Attributes:
        vocabulary_size: all ids are below it.
        end_id: the token that ends a document.
        begin_id: the token that a document begins with, where the tokenizer has one.
    """

    vocabulary_size: int
    end_id: int
    begin_id: int | None

    @property
    def start_id(self) -> int:
        """The token from which the first one of a document is predicted: `begin_id`, or else `end_id`."""
        return self.end_id if self.begin_id is None else self.begin_id

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32, without tokens for its beginning and end."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int | np.integer] | np.ndarray) -> str:
        """The text of token ids."""

    @abc.abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token, special or not, by its name in the vocabulary; None where there is none."""

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

    def encode(self, text: str) -> np.ndarray:
        """The bytes of a text, int32."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

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

    def __init__(self, backend: tokenizers.Tokenizer, *, end_id: int, begin_id: int | None):
        """Take over `backend`, turning off what would change a text: truncation, padding, special tokens."""
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._has_fallback_bytes = '"ByteFallback"' in json.dumps(json.loads(backend.to_str()).get("decoder"))
        self.end_id = end_id
        self.begin_id = begin_id
        self.vocabulary_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32."""
        # Unlike encode, the batch form lets other threads run meanwhile, and computes no offsets.
        encoding = self._backend.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array(encoding.ids, np.int32)

    def decode(self, ids: Sequence[int | np.integer] | np.ndarray) -> str:
        """The text of token ids, special tokens included."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, such as </s>."""
        return self._backend.token_to_id(token)

    def is_fallback_byte(self, token: int) -> bool:
        """Return whether a token is a byte, such as <0xE7>, or no token at all, which decoding leaves out of a run."""
        if not self._has_fallback_bytes:
            return False
        name = self._backend.id_to_token(int(token))
        return name is None or _FALLBACK_BYTE.fullmatch(name) is not None

    def save(self, directory: epath.PathLike) -> None:
        """Write the tokenizer in the library's own format."""
        info = {"kind": "tokenizers", "end_id": self.end_id, "begin_id": self.begin_id}
        _write_files(directory, {_LIBRARY_FILE: self._backend.to_str(), _INFO: json.dumps(info)})


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
        for vocabulary, merges in _GPT2_FILES:
            paths = os.path.join(directory, vocabulary), os.path.join(directory, merges)
            if all(map(os.path.isfile, paths)) and not os.path.isfile(os.path.join(directory, _LIBRARY_FILE)):
                return _gpt2(*paths)
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
        return LibraryTokenizer(backend, end_id=info["end_id"], begin_id=info["begin_id"])
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
    for text in grain.MapDataset.source(open_source(config, "train")).shuffle(seed=0):
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt2(vocabulary: str, merges: str) -> LibraryTokenizer:
    try:
        backend = _byte_level(models.BPE.from_file(vocabulary, merges))
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(f"data.tokenizer: cannot read {vocabulary} and {merges}: {first_line(error)}") from error
    end_id = backend.token_to_id(END_OF_DOCUMENT)
    if end_id is None:
        raise ConfigError(f"data.tokenizer: {vocabulary} has no token {END_OF_DOCUMENT} to end documents with")
    backend.add_special_tokens([END_OF_DOCUMENT])
    return LibraryTokenizer(backend, end_id=end_id, begin_id=end_id)


def _hugging_face(name: str, problem: str) -> LibraryTokenizer:
    import transformers

    try:
        found: Any = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        backend = tokenizers.Tokenizer.from_str(found.backend_tokenizer.to_str())
    except Exception as error:  # whatever the files of others hold
        raise ConfigError(f"{problem} ({first_line(error)})") from error
    end_id = found.eos_token_id if found.eos_token_id is not None else found.sep_token_id
    require(end_id is not None, f"data.tokenizer: {name} has neither eos_token nor sep_token to end documents with")
    begin_id = found.bos_token_id if found.bos_token_id is not None else found.cls_token_id
    return LibraryTokenizer(backend, end_id=end_id, begin_id=begin_id)
