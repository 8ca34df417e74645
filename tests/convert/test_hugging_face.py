"""Directories of Hugging Face: a head of its own or the embedding's, whatever config.json says."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lin_jax.convert.hugging_face import read_hugging_face
from tests.convert.test_convert import GPT2, LLAMA, convert, edit_config, make_directory

pytestmark = pytest.mark.usefixtures("quick_compilation")

FAMILIES = {"llama": (LLAMA, "model.embed_tokens.weight"), "gpt2": (GPT2, "transformer.wte.weight")}
HEAD = "lm_head.weight"
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 20), np.int32))


@pytest.fixture(params=FAMILIES)
def tied(request, tmp_path):
    """A directory whose config.json says that head and embedding are one; and the embedding's name."""
    config, embedding = FAMILIES[request.param]
    return make_directory(tmp_path / "tied", dataclasses.replace(config, tie_embeddings=True)), embedding


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return tensors


def logits_by_hand(weights, head_VC):
    """Of the features, which no head changes."""
    return np.asarray(weights.model().features(TOKENS), np.float64) @ head_VC.T.astype(np.float64)


def test_a_head_of_its_own_is_kept(tied, tmp_path):
    source, embedding = tied
    random = np.random.default_rng(1)
    head_VC = random.normal(size=load_file(source / "model.safetensors")[embedding].shape).astype(np.float32)
    tensors = edit(source, lambda tensors: tensors.update({HEAD: head_VC}))
    weights = read_hugging_face(source)
    assert not weights.config.tie_embeddings
    np.testing.assert_array_equal(weights.arrays["embedding"], tensors[embedding])
    np.testing.assert_array_equal(weights.arrays["logits.kernel"], head_VC.T)
    logits, expected = np.asarray(weights.model()(TOKENS)), logits_by_hand(weights, head_VC)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    assert convert(source, tmp_path / "run") == 0 and convert(tmp_path / "run", tmp_path / "back", "--to", "hf") == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() and np.array_equal(back[HEAD], head_VC)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_that_is_the_embedding_is_none_of_its_own(tied):
    source, embedding = tied
    tensors = edit(source, lambda tensors: tensors.update({HEAD: tensors[embedding].copy()}))
    weights = read_hugging_face(source)
    assert weights.config.tie_embeddings and "logits.kernel" not in weights.arrays
    expected = logits_by_hand(weights, tensors[embedding])
    assert np.abs(np.asarray(weights.model()(TOKENS)) - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_head_alone_is_the_embedding_too(tied):
    source, embedding = tied
    before = read_hugging_face(source)
    edit(source, lambda tensors: tensors.update({HEAD: tensors.pop(embedding)}))
    after = read_hugging_face(source)
    assert after.config == before.config
    np.testing.assert_array_equal(after.arrays["embedding"], before.arrays["embedding"])


def test_a_difference_in_one_number_is_one(tied):
    source, embedding = tied

    def change(tensors):
        tensors[HEAD] = tensors[embedding].copy()
        tensors[HEAD][-1, -1] = np.nextafter(tensors[HEAD][-1, -1], np.float32(9))

    edit(source, change)
    assert not read_hugging_face(source).config.tie_embeddings


def test_an_untied_model_keeps_its_equal_head_and_needs_one(tied, capsys, tmp_path):
    source, embedding = tied
    edit_config(source, tie_word_embeddings=False)
    assert convert(source, tmp_path / "out") == 2
    assert f"the checkpoint lacks {HEAD}" in capsys.readouterr().err
    edit(source, lambda tensors: tensors.update({HEAD: tensors[embedding].copy()}))
    assert not read_hugging_face(source).config.tie_embeddings


def test_a_bare_gpt2_with_a_head_of_its_own(tmp_path):
    source = make_directory(tmp_path / "source", GPT2)
    tensors = {n.removeprefix("transformer."): a for n, a in load_file(source / "model.safetensors").items()}
    tensors[HEAD] = tensors["wte.weight"] + 1
    save_file(tensors, source / "model.safetensors")
    np.testing.assert_array_equal(read_hugging_face(source).arrays["logits.kernel"], tensors[HEAD].T)
