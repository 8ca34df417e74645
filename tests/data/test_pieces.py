"""Documents in pieces: together their tokens are those of the whole document, for every kind of tokenizer."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from lin_jax.data import pieces, sources
from lin_jax.data.documents import validation_documents
from lin_jax.data.pieces import tokens_of_piece
from lin_jax.data.pipeline import token_pairs, validation_bytes_per_token
from lin_jax.data.sources import open_source
from lin_jax.data.tokenizers import BytesTokenizer, LibraryTokenizer, load_tokenizer
from lin_jax.settings.data import DataConfig

SHARED = Path(os.environ.get("LIN_JAX_GOLDEN", Path(__file__).parents[3] / "shared/golden")).parent / "data"
SAMPLE = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside. It's 12345 o'clock, isn't it?\n",
    "  An indented line\n\n\nand\tblank ones.  Two  spaces   three.\r\nNaïve café, 漢字かな交じり文 and 🙂🙃 emoji.\n",
    "aaaaaaaaaa bbbbb 1000000 === --- ... x = y*z+1; fooBarBaz foo_bar\n",
] * 40
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def learned(backend, trainer):
    backend.train_from_iterator(SAMPLE, trainer)
    return LibraryTokenizer(backend, end_id=0, begin_id=None)


def byte_level(words=None):
    backend = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    if words is not None:
        level = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), level])
    backend.pre_tokenizer, backend.decoder = level, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    return learned(backend, trainer)


def sentencepiece_bpe():
    """As LLaMA's: spaces become a letter, one is put before the text, and the text is one word, newlines in bytes."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<end>", "<unk>", *spelled], show_progress=False)
    # Learned in words, as sentencepiece does, and used without.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split("▁", "merged_with_next")]
    )
    backend.train_from_iterator([text[:100] for text in SAMPLE], trainer)
    state = json.loads(backend.to_str())
    state["pre_tokenizer"], state["added_tokens"] = None, []
    return LibraryTokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), end_id=0, begin_id=None)


def unigram(with_words):
    """As T5's with words; as some of sentencepiece's without."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<end>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(SAMPLE, trainer)
    if not with_words:
        backend.pre_tokenizer = None
    return LibraryTokenizer(backend, end_id=0, begin_id=None)


def wordpiece():
    """As BERT's: lower case, accents and white space are lost."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return learned(
        backend, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<end>", "<unk>"], show_progress=False)
    )


def shared(name):
    return load_tokenizer(DataConfig(tokenizer=str(SHARED / name)), "unused")


MAKERS = {
    "bytes": BytesTokenizer,
    "byte-level": byte_level,
    "byte-level, digits in threes": functools.partial(byte_level, LLAMA3_WORDS),
    "sentencepiece": sentencepiece_bpe,
    "unigram, words": functools.partial(unigram, True),
    "unigram": functools.partial(unigram, False),
    "wordpiece": wordpiece,
    "stories260k": functools.partial(shared, "stories260k_hf"),
    "gpt2": functools.partial(shared, "tokenizers/gpt2"),
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    if request.param in ("stories260k", "gpt2") and not SHARED.is_dir():
        pytest.skip(f"no real tokenizers at {SHARED}")
    return MAKERS[request.param]()


@dataclasses.dataclass
class Pieces:
    """Documents, each cut into pieces."""

    documents: list[list[str]]

    def __post_init__(self):
        self.flat = [piece for document in self.documents for piece in document]
        self.last = [at == len(document) - 1 for document in self.documents for at in range(len(document))]

    def __len__(self):
        return len(self.flat)

    def __getitem__(self, index):
        return self.flat[index]

    def ends(self, index):
        return self.last[index]

    fingerprint = ""


CONTEXT = 128
PARTS = st.one_of(
    st.sampled_from([*"aeionst .,'\n\t1é漢🙂", "  ", "\n\n", " the", " and", "ing", "'s", "e\u0301", "\r\n"]),
    st.text(min_size=1, max_size=6),
    st.integers(0, 10**9).map(str),
    st.sampled_from(SAMPLE),
)


@st.composite
def documents(draw):
    """A long text, cut anywhere into pieces that are not much shorter than real ones are beside the context."""
    text = "".join(draw(st.lists(PARTS, min_size=20, max_size=150)))
    while len(text) < 5 * CONTEXT:
        text += draw(st.sampled_from(SAMPLE)) + text[: 3 * CONTEXT]
    cuts, at = [], 0
    while len(text) - at > 2 * CONTEXT:
        at += draw(st.integers(CONTEXT, 2 * CONTEXT))
        cuts.append(at)
    cuts.append(len(text)) if draw(st.booleans()) and cuts[-1] < len(text) - 1 else None
    borders = [0, *[cut for cut in cuts if cut < len(text)], len(text)]
    return [text[a:b] for a, b in zip(borders, borders[1:], strict=False)]


def joined(source, tokenizer, first, count):
    return np.concatenate([tokens_of_piece(source, tokenizer, first + at)[0] for at in range(count)]).tolist()


LINES = "".join(f"line {number} of it\n\n  {'x' * (number % 9)}" for number in range(200))
NO_WORDS = ["ab" * 100, "ba" * 150, "a" * 400]


@settings(deadline=None, max_examples=60)
@given(pieces_of=documents())
@example(pieces_of=[LINES[:1000], LINES[1000:2001], LINES[2001:]])
@example(pieces_of=["\n" * 300, "\n" * 200 + "a", "b" + " " * 500])
@example(pieces_of=["1" * 301, "2" * 300, "3" * 299 + " end of it. " * 20])
@example(pieces_of=NO_WORDS)
def test_the_tokens_of_all_pieces_are_those_of_the_whole(tokenizer, pieces_of):
    whole = tokenizer.encode("".join(pieces_of)).tolist()
    source = Pieces([["a document before."], pieces_of, ["another", " one"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "CONTEXT", CONTEXT)
        assert joined(source, tokenizer, 1, len(pieces_of)) == whole
        # Each knows the token before its own, and the pairs of all are those of the whole, in order.
        pairs = np.concatenate([token_pairs(source, tokenizer, 1 + at) for at in range(len(pieces_of))])
        targets = [*whole, tokenizer.end_id]
        assert pairs.tolist() == [list(pair) for pair in zip([tokenizer.start_id, *whole], targets, strict=True)]


def test_real_pieces_of_a_file(tokenizer, tmp_path, monkeypatch):
    text = "".join(f"{SAMPLE[number % 3]}{number} " for number in range(900))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sources, "VALIDATION_PIECE_BYTES", 1 << 14)
    monkeypatch.setattr(sources, "LEAST_TRAIN_PIECE_BYTES", 1 << 14)
    monkeypatch.setattr(sources, "TRAIN_PIECE_BYTES_PER_TOKEN", 0)
    path = (str(tmp_path / "a.txt"),)
    whole = [*tokenizer.encode(text).tolist(), tokenizer.end_id]
    config = DataConfig(source="text", validation_path=path)
    ((ids, size),) = validation_documents(config, tokenizer)
    assert ids.tolist() == whole and size == len(text.encode()) and ids.dtype == np.int32
    assert validation_bytes_per_token(config, tokenizer) == size / len(whole)
    source = open_source(config, "validation")
    assert len(source) > 3
    pairs = [token_pairs(source, tokenizer, index) for index in range(len(source))]
    merges_or_has_words = tokenizer.border(text[: 2 * pieces.CONTEXT], pieces.CONTEXT, pieces.CONTEXT) is not None
    assert all(len(part) > 1000 for part in pairs) == merges_or_has_words
    assert np.concatenate(pairs).tolist() == [list(p) for p in zip([tokenizer.start_id, *whole], whole, strict=False)]
