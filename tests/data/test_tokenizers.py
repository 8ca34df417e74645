"""Tokenizers: round trips, known ids, and what checkpoints carry."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lin_jax.data.tokenizers import BytesTokenizer, load_tokenizer, restore_tokenizer
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
    assert (tokenizer.vocabulary_size, tokenizer.end_id, tokenizer.begin_id) == (50257, 50256, 50256)
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
