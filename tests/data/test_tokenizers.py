"""Tokenizers: round trips, known ids, and what checkpoints carry."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lin_jax.data.tokenizers import BytesTokenizer, LibraryTokenizer, load_tokenizer, restore_tokenizer
from lin_jax.experiment import ConfigError, DataConfig

STORIES = [f"The cat number {number} sat on the mat. <|endoftext|> é 猫\n" for number in range(100)]


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids, tokenizer.end_id]) == text
    assert tokenizer.vocabulary_size == 257 and tokenizer.start_id == tokenizer.end_id == 256


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    directory = tmp_path_factory.mktemp("learned")
    (directory / "a.txt").write_text("|".join(STORIES))
    config = DataConfig(
        source="text", path=(str(directory / "a.txt"),), separator="|", tokenizer="train", tokenizer_vocabulary=300
    )
    return config, directory / "tokenizer"


def test_a_learned_tokenizer_is_kept(learned):
    config, directory = learned
    first = load_tokenizer(config, directory)
    assert 257 < first.vocabulary_size <= 300
    assert len(first.encode(STORIES[0])) < len(STORIES[0].encode()) / 2
    written = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    second = load_tokenizer(config, directory)
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == written
    assert second.encode(STORIES[7]).tolist() == first.encode(STORIES[7]).tolist()


def test_learning_is_repeatable(learned, tmp_path):
    config, directory = learned
    load_tokenizer(config, directory)
    load_tokenizer(config, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == (directory / "tokenizer.json").read_text()


@given(text=st.text())
def test_a_learned_tokenizer_spells_any_text(learned, text):
    tokenizer = load_tokenizer(*learned)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
    assert tokenizer.end_id not in ids, "nothing in a text ends a document"


def test_a_kept_tokenizer_larger_than_the_setting_is_refused(learned):
    config, directory = learned
    load_tokenizer(config, directory)
    import dataclasses

    with pytest.raises(ConfigError, match="use another directory"):
        load_tokenizer(dataclasses.replace(config, tokenizer_vocabulary=260), directory)
    with pytest.raises(ConfigError, match=r"data\.tokenizer_vocabulary must be at least 257"):
        load_tokenizer(dataclasses.replace(config, tokenizer_vocabulary=256), directory)


def test_gpt2_files(shared_data):
    tokenizer = load_tokenizer(DataConfig(tokenizer=str(shared_data / "tokenizers" / "gpt2")), "unused")
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.encode("Hello<|endoftext|>").tolist()[-1] != 50256
    assert (tokenizer.vocabulary_size, tokenizer.end_id, tokenizer.begin_id) == (50257, 50256, None)
    text = "  Naïve 漢字 🙂\n\n\tend "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_hugging_face_directory(shared_data):
    import tokenizers

    directory = shared_data / "stories260k_hf"
    tokenizer = load_tokenizer(DataConfig(tokenizer=str(directory)), "unused")
    assert (tokenizer.vocabulary_size, tokenizer.begin_id, tokenizer.end_id) == (512, 1, 2)
    plain = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "Once upon a time, there was a little girl."
    assert tokenizer.encode(text).tolist() == plain.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_save_writes_is_read_back(learned, tmp_path):
    for tokenizer in (BytesTokenizer(), load_tokenizer(*learned)):
        tokenizer.save(tmp_path / "saved")
        restored = restore_tokenizer(tmp_path / "saved")
        assert type(restored) is type(tokenizer)
        assert restored.encode(STORIES[0]).tolist() == tokenizer.encode(STORIES[0]).tolist()
        for field in ("vocabulary_size", "end_id", "begin_id", "start_id"):
            assert getattr(restored, field) == getattr(tokenizer, field)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["tokenizer.json", "tokenizer_info.json"]


def test_truncation_and_padding_of_a_tokenizer_file_are_turned_off(tmp_path):
    import tokenizers
    from tokenizers import models, pre_tokenizers

    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "model_max_length": 2}'
    )
    tokenizer = load_tokenizer(DataConfig(tokenizer=str(tmp_path)), "unused")
    assert tokenizer.encode("a a a a").tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("content", [None, "{}", '{"kind": "tokenizers", "end_id": 0, "begin_id": null}'])
def test_a_directory_without_a_whole_tokenizer_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer_info.json").write_text(content)
    with pytest.raises(ConfigError, match="no tokenizer can be read from"):
        restore_tokenizer(tmp_path)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer: no tokenizer can be read from") as caught:
        load_tokenizer(DataConfig(tokenizer=str(tmp_path)), "unused")
    assert "\n" not in str(caught.value)
    (tmp_path / "encoder.json").write_text("{}")
    (tmp_path / "vocab.bpe").write_text("a b")
    with pytest.raises(ConfigError, match=r"data\.tokenizer: "):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path)), "unused")


def test_a_name_that_cannot_be_had_is_refused(monkeypatch):
    import transformers

    def unreachable(*_, **__):
        raise OSError("We couldn't connect.\nCheck the network.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: some/name is no directory and cannot be had") as caught:
        load_tokenizer(DataConfig(tokenizer="some/name"), "unused")
    assert "\n" not in str(caught.value)


def write_library_tokenizer(directory, *, before=(), after=(), **settings):
    """A tokenizer of single letters in Hugging Face's form, which puts some tokens before and after a text."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    special = ["<s>", "</s>", "<cls>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *"abcdefgh"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if before or after:
        template = " ".join([*before, "$A", *after])
        used = [(token, vocabulary[token]) for token in {*before, *after}]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def load(directory):
    return load_tokenizer(DataConfig(tokenizer=str(directory)), "unused")


@pytest.mark.parametrize(
    ("before", "after", "settings", "begin_id"),
    [
        ((), (), {"bos_token": "<s>"}, None),  # there is one, and it is not used
        ((), (), {"bos_token": "<s>", "add_bos_token": False}, None),
        (("<s>",), (), {"bos_token": "<s>"}, 0),
        (("<s>",), ("</s>",), {"bos_token": "<s>"}, 0),
        (("<s>",), (), {}, 0),  # it has no name, and is used
        ((), ("</s>",), {"bos_token": "<s>"}, None),
        (("<cls>",), ("</s>",), {"bos_token": "<s>", "cls_token": "<cls>"}, 2),
        ((), (), {"cls_token": "<cls>"}, None),
    ],
)
def test_a_text_begins_with_what_the_tokenizer_itself_puts_before_it(before, after, settings, begin_id, tmp_path):
    import transformers

    tokenizer = load(write_library_tokenizer(tmp_path / "t", before=before, after=after, **settings))
    assert tokenizer.begin_id == begin_id and tokenizer.end_id == 1
    assert tokenizer.start_id == (1 if begin_id is None else begin_id)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")("abc").input_ids
    ours = [*([] if tokenizer.begin_id is None else [tokenizer.begin_id]), *tokenizer.encode("abc").tolist()]
    assert theirs[: len(theirs) - len(after)] == ours


def test_two_tokens_before_a_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="puts 2 tokens before a text"):
        load(write_library_tokenizer(tmp_path / "t", before=("<cls>", "<s>")))


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (None, None, (1,)),
        ({"eos_token_id": [1, 7]}, None, (1, 7)),
        ({"eos_token_id": 9}, {"eos_token_id": [1, 5]}, (1, 9)),  # the first file that says something
        ({"temperature": 0.5}, {"eos_token_id": [5, 6]}, (1, 5, 6)),
        ({"eos_token_id": None}, {"eos_token_id": 6}, (1, 6)),
        (None, {"eos_token_id": []}, (1,)),
    ],
)
def test_all_tokens_that_end_a_text_are_known_and_kept(generation, config, ends, tmp_path):
    directory = write_library_tokenizer(tmp_path / "t")
    for name, values in (("generation_config.json", generation), ("config.json", config)):
        if values is not None:
            (directory / name).write_text(json.dumps(values), encoding="utf-8")
    tokenizer = load(directory)
    assert tokenizer.end_ids == ends and tokenizer.end_id == 1
    tokenizer.save(tmp_path / "saved")
    assert restore_tokenizer(tmp_path / "saved").end_ids == ends
    (tmp_path / "saved" / "tokenizer_info.json").write_text('{"kind": "tokenizers", "end_id": 1, "begin_id": null}')
    assert restore_tokenizer(tmp_path / "saved").end_ids == (1,), "saved before there was a list"


@pytest.mark.parametrize("wrong", ["</s>", 1.5, True, [1, "2"], {"a": 1}, [[1]], -1, [1, -5]])
def test_ends_of_a_wrong_type_are_refused(wrong, tmp_path):
    directory = write_library_tokenizer(tmp_path / "t")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id"):
        load(directory)


@pytest.mark.parametrize(
    ("files", "lacking"),
    [
        ([], "which has no tokenizer.json, no encoder.json with vocab.bpe"),
        (["config.json", "tokenizer_config.json", "special_tokens_map.json"], "which has no tokenizer.json"),
        (["vocab.json"], "which lacks merges.txt"),
        (["merges.txt"], "which lacks vocab.json"),
        (["encoder.json"], "which lacks vocab.bpe"),
        (["vocab.bpe", "tokenizer_config.json"], "which lacks encoder.json"),
    ],
)
def test_half_a_tokenizer_is_none(files, lacking, tmp_path):
    for name in files:
        (tmp_path / name).write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match=lacking) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_nothing_but_special_tokens_is_none(tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE({}, []))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="it knows no tokens but special ones"):
        load(tmp_path)


def test_a_pattern_that_backtracks_without_end_is_refused_in_one_line():
    """(a+)+$ tries all 2**999 ways to cut the letters into words."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    backend = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate("abc")}, []))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    tokenizer = LibraryTokenizer(backend, end_id=0, begin_id=None)
    text = "a" * 1000 + "c"
    for ask, arguments in (("encode", ()), ("border", (500, 100)), ("encode_between", (0, 500))):
        with pytest.raises(ConfigError, match='the tokenizer fails at "aaaa.*retry-limit-in-match') as error:
            getattr(tokenizer, ask)(text, *arguments)
        assert "\n" not in str(error.value)
    np.testing.assert_array_equal(tokenizer.encode("aab"), [0, 0, 1])
