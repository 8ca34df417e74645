"""Agreement with numbers of the official code and of transformers; an id is the name of the case's file.

What a test does follows from the case's own files: its family, settings, flags, and which arrays there are. What cannot
be run fails, and says why; only what `LATER` lists is skipped.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lin_jax.convert import gpt2, llama, t5
from lin_jax.convert.conversion import conversion_of
from lin_jax.convert.flash import config_from_official, from_official, kernel_of, to_official
from lin_jax.convert.hugging_face import ModelWeights, read_hugging_face
from lin_jax.convert.medusa import heads_from_official, heads_to_official
from lin_jax.convert.names import load, to_theirs
from lin_jax.decode.accept import accept_exact, accept_typical
from lin_jax.decode.draft import from_heads
from lin_jax.decode.generate import generate_tokens
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.layers.partition import WHOLE
from lin_jax.layers.rope import rotation
from lin_jax.layers.rows import place
from lin_jax.layers.stack import each_layer, run_layers
from lin_jax.models.base import Decoder
from lin_jax.models.encoder_decoder import shift_right
from lin_jax.models.gpt2 import Gpt2
from lin_jax.models.llama import Llama, LlamaAttention
from lin_jax.models.registry import create_model
from lin_jax.models.t5 import T5
from lin_jax.ops.linear_attention import verify
from lin_jax.ops.tree import TREES, Tree, tree_from_paths
from lin_jax.settings.foreign import Fields
from lin_jax.settings.generate import GenerateConfig
from tests.golden import Golden, directory, golden_cases
from tests.official_flags import (
    OWN,
    UnsupportedFlag,
    added_filters,
    benchmark_attention,
    gpt2_attention,
    llama_attention,
    medusa_attention,
    t5_attentions,
)
from tests.official_llama import OfficialLlama

# Families that later steps build, with what they are. One of hf is the model_type of config.json, or its rope scaling.
LATER = {
    "hf qwen2": "checkpoints of other makers",
    "hf qwen3": "checkpoints of other makers",
    "hf mistral": "checkpoints of other makers",
    "hf rope yarn": "rope scalings",
    "hf rope longrope": "rope scalings",
}
CASES = golden_cases()
LOGITS, LOSS, GRADIENTS = 1e-4, 1e-5, 1e-3
# What moves all scores of a query alike, which softmax does not see: its gradient is 0 but for rounding.
ADDS_NOTHING = "attention.self.key.bias"


def families(case: Golden) -> list[str]:
    """The names by which `LATER` may list a case."""
    if case.family != "hf":
        return [case.family]
    rope = case.config.get("rope_parameters") or case.config.get("rope_scaling") or {}
    return [f"hf {case.config.get('model_type')}", f"hf rope {rope.get('rope_type', rope.get('type'))}"]


# What all families share: what is compared, and the losses.


def check_close(actual, expected: np.ndarray, tolerance: float = LOGITS, where: Any = ...) -> None:
    assert np.isfinite(expected[where]).all(), "the case holds NaN where nothing says that the official code makes one"
    assert actual.shape == expected.shape
    assert np.abs(np.asarray(actual) - expected)[where].max() < tolerance


def check_loss(actual, expected: np.ndarray) -> None:
    assert abs(float(actual) - float(expected)) < LOSS * max(1.0, abs(float(expected)))


def used_taps(name: str, gradient: np.ndarray) -> np.ndarray:
    """The official mask acts outside autograd, so masked taps hold gradients that mean nothing; encoders have none."""
    is_filter = name.endswith(("dwconv.weight", "dconv_ada.weight")) and "encoder." not in name
    return gradient[:, :, : gradient.shape[2] // 2 + 1] if is_filter else gradient


def check_gradients(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], tolerance=GRADIENTS) -> None:
    """Compare each; what only one side has must be 0 (the official code gives what it does not use no gradient)."""
    largest = max(np.abs(array).max() for array in theirs.values())
    for name in ours.keys() | theirs.keys():
        if name.endswith(ADDS_NOTHING):
            assert max(np.abs(side[name]).max() for side in (ours, theirs)) < 1e-6 * largest, name
            continue
        if name not in theirs or name not in ours:
            assert not (ours if name in ours else theirs)[name].any(), f"only one side has a gradient of {name}"
            continue
        actual, expected = used_taps(name, ours[name]), used_taps(name, theirs[name])
        assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-7), name


def loss_of(logits, arrays: Mapping[str, Any]):
    """The loss that the arrays of a case mean: a product, of classes, or of the next token; None without any."""
    ids = arrays.get("ids", arrays.get("input_ids"))
    if "cotangent" in arrays:
        return jnp.sum(logits * arrays["cotangent"])
    if logits.ndim == 2:
        return None if "labels" not in arrays else cross_entropy(logits, arrays["labels"])
    return cross_entropy(logits[:, :-1], arrays.get("labels", ids)[:, 1:])


def cross_entropy(logits, labels):
    """The mean over labels that are not -100."""
    counted = labels != -100
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, labels, 0))
    return jnp.sum(losses * counted) / jnp.sum(counted)


def loss_and_gradient(model: nnx.Module, run: Callable[[Any], tuple[Any, Any]]):
    """Loss and logits of `run`, and their gradient as a model; without a loss both are None."""
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    loss, logits = jax.eval_shape(lambda s: run(nnx.merge(graph, s, rest)), state)
    if loss is None:
        return (None, jax.jit(lambda s: run(nnx.merge(graph, s, rest))[1])(state)), None
    step = jax.value_and_grad(lambda s: run(nnx.merge(graph, s, rest)), has_aux=True)
    found, gradient = jax.jit(step)(state)
    return found, nnx.merge(graph, gradient, rest)


def check_loss_and_gradients(case: Golden, loss, ours: Callable[[], Mapping[str, np.ndarray]]) -> None:
    """Compare what the case stores of them; it may store neither."""
    expected, theirs = case.arrays("out"), case.arrays("grad")
    if loss is None:
        assert "loss" not in expected and not theirs, "the case has a loss, but neither labels nor a cotangent"
        return
    if "loss" in expected:
        check_loss(loss, expected["loss"])
    if theirs:
        check_gradients(ours(), theirs)


# FLASH.


def flash_loss(model, official: Mapping[str, Any], arrays: Mapping[str, np.ndarray]):
    """The loss as the case defines it, None where it has none, and the logits."""
    ids, mask, wrapped = jnp.asarray(arrays["ids"]), arrays.get("mask"), official["autoregressive_wrapper"]
    # The official wrapper reads all but the last token, and cuts a mask that is as long as the whole.
    read = ids[:, :-1] if wrapped else ids
    logits = model(read, None if mask is None else jnp.asarray(mask[:, : read.shape[1]], jnp.int32))
    if wrapped:
        return cross_entropy(logits, ids[:, 1:]), logits
    return (loss_of(logits, arrays) if "cotangent" in arrays else None), logits


def check_flash(case: Golden) -> None:
    official, arrays, theirs = case.config, case.arrays("in"), case.arrays("param")
    kernel = kernel_of(shapes_of(theirs))
    model = from_official(config_from_official(official), theirs, kernel)
    for name, array in to_official(model, kernel).items():
        np.testing.assert_array_equal(array, theirs[name])

    (loss, logits), gradient = loss_and_gradient(model, lambda model: flash_loss(model, official, arrays))
    check_close(logits, case.arrays("out")["logits"])
    check_loss_and_gradients(case, loss, lambda: to_official(gradient, kernel, parameters_by_path(gradient)))


# LLaMA and GPT-2.


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A case's model with its parameters; `filters` is how often the official code adds its convolution."""

    model: Any
    family: Any
    filters: int = 1

    def to_official(self, model) -> dict[str, np.ndarray]:
        """Gradients, in a model, under the official names."""
        config = self.model.config
        named = to_theirs(self.family.name_table(config), parameters_by_path(model), config.depth)
        return {k: a * self.filters if k.endswith("dwconv.weight") else a for k, a in named.items()}


def load_transformer(config, family, theirs: Mapping[str, np.ndarray], filters: int = 1) -> Transformer:
    """The model of a case. A filter that is added twice is one of twice the size."""
    model = create_model(config, nnx.Rngs(0))
    table = family.name_table(config)
    known = {entry.theirs.format(layer=layer) for entry in table for layer in range(config.depth)}
    unread = tuple(name for name in theirs if name.endswith(OWN) and name not in known)
    arrays = {k: a * filters if k.endswith("dwconv.weight") else a for k, a in theirs.items()}
    load(model, table, arrays, config.depth, (*family.ignored(config), *unread))
    return Transformer(model, family, filters)


def shapes_of(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def is_padded(mask) -> bool:
    return mask is not None and not np.asarray(mask).all()


def check_llama_train(case: Golden) -> None:
    values, flags, arrays, theirs = case.config, case.config["flags"], case.arrays("in"), case.arrays("param")
    if is_padded(arrays.get("attention_mask")):
        raise UnsupportedFlag("attention_mask: the official code hides padding from the local branch alone")
    attention = llama_attention(flags, shapes_of(theirs), arrays["ids"].shape[1])
    config = llama.config_from_hugging_face(Fields(values, case.name), shapes_of(theirs))
    config = dataclasses.replace(config, attention=attention)
    found = load_transformer(config, llama, theirs, max(1, added_filters(flags)))

    def run(model):
        logits = model(jnp.asarray(arrays["ids"]))
        return loss_of(logits, arrays), logits

    (loss, logits), gradient = loss_and_gradient(found.model, run)
    check_close(logits, case.arrays("out")["logits"])
    if flags.get("NORM_GLOBAL") and flags["USE_GLOBAL"] and flags["USE_LINEAR"] and case.arrays("grad"):
        check_loss(loss, case.arrays("out")["loss"])
        check_normalised_sum(case, found.to_official(gradient))
        return
    check_loss_and_gradients(case, loss, lambda: found.to_official(gradient))


def check_normalised_sum(case: Golden, ours: dict) -> None:
    """With NORM_GLOBAL the stored gradients hold rounding of the official code that the equations do not have.

    The first group sees no group before it: its sum is 0, and there x / (1e-5 + |x|) has a derivative of 1e5. The
    official sum "all up to one's own, minus one's own" adds what comes through it to the others, and takes it off
    again: what is left of float32 are errors of order 1e-2, in what concerns the keys and values of the first group.
    """
    ids, values, theirs = case.arrays("in")["ids"], case.config, case.arrays("grad")
    params = {name: array for name, array in case.arrays("param").items() if not name.endswith("conv_mask")}
    direct, minus_own = (OfficialLlama(ids, values, minus_own=form) for form in (False, True))
    exact = direct(params, "float64")
    check_gradients(ours, exact.gradients)
    check_gradients(minus_own(params, "float64").gradients, exact.gradients, 1e-8)
    check_gradients(direct(params, "float32").gradients, exact.gradients, 1e-4)
    rounded = []
    for seed in range(4):
        # What the official form loses in float32 depends on the last bit of every number before it.
        random = np.random.default_rng(seed)
        moved = {name: array * (1 + 1e-6 * random.standard_normal(array.shape)) for name, array in params.items()}
        rounded.append(errors(minus_own(moved, "float32").gradients, direct(moved, "float64").gradients))
    stored = errors(theirs, exact.gradients)
    for name, error in stored.items():
        possible = max(np.abs(other[name]).max() for other in rounded)
        assert np.abs(error).max() <= 3 * possible + 1e-5 * np.abs(exact.gradients[name]).max(), name
    for layer, x_NC in enumerate(exact.inputs):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        for error in (stored[name], rounded[0][name]):
            if np.abs(error).max() > 5e-3 * np.abs(exact.gradients[name]).max():
                assert share_outside(error, x_NC[: values["flags"]["GROUP_SIZE"]]) < 1e-2


def errors(actual: dict, expected: dict) -> dict:
    return {name: used_taps(name, actual[name]) - used_taps(name, expected[name]) for name in actual}


def share_outside(matrix_OC: np.ndarray, rows_NC: np.ndarray) -> float:
    """How much of a gradient of x -> W x does not come from the given x."""
    basis, _ = np.linalg.qr(rows_NC.T)
    return float(np.linalg.norm(matrix_OC - matrix_OC @ basis @ basis.T) / np.linalg.norm(matrix_OC))


def check_gpt2(case: Golden) -> None:
    values, flags, arrays, theirs = case.config, case.config["flags"], case.arrays("in"), case.arrays("param")
    # FLASH=1 gives the model one head.
    values = values | {"n_head": 1} if flags.get("FLASH") else values
    config = gpt2.config_from_hugging_face(Fields(values, case.name), shapes_of(theirs))
    config = dataclasses.replace(config, attention=gpt2_attention(flags, shapes_of(theirs)))
    found = load_transformer(config, gpt2, theirs)
    ids, mask = arrays["ids"], arrays.get("attention_mask")

    def run(model):
        if not config.labels:
            logits = model.head(official_features(model, ids, mask))
            return loss_of(logits, arrays), logits
        if mask is None or (official_last(values, ids) == mask.sum(1) - 1).all():
            logits = model.classify(jnp.asarray(ids), None if mask is None else jnp.asarray(mask, jnp.int32))
        else:
            x_BTC = official_features(model, ids, mask)
            logits = model.score(x_BTC[np.arange(len(ids)), official_last(values, ids)])
        return loss_of(logits, arrays), logits

    (loss, logits), gradient = loss_and_gradient(found.model, run)
    check_close(logits, case.arrays("out")["logits"])
    check_loss_and_gradients(case, loss, lambda: found.to_official(gradient))


def official_last(values: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    """The token that the official classifier reads: the one before the first padding, else the last one."""
    is_padding = ids == values["pad_token_id"]
    return (np.where(is_padding.any(1), is_padding.argmax(1), 0) - 1) % ids.shape[1]


def official_features(model: Gpt2, ids: np.ndarray, mask: np.ndarray | None):
    """What the head reads where positions are those of the row, and padding is hidden from softmax attention alone."""
    config, (B, T) = model.config, ids.shape
    hidden = mask if is_padded(mask) and config.attention.kind == "softmax" else None
    if hidden is not None and (np.abs(np.diff(np.pad(hidden.astype(int), ((0, 0), (1, 1))))).sum(1) != 2).any():
        raise UnsupportedFlag("attention_mask: softmax attention that sees around padding between tokens")
    rows = place(None if hidden is None else jnp.asarray(hidden, jnp.int32), (B, T), heads="heads")
    x_BTC = model.embed(jnp.asarray(ids), jnp.broadcast_to(jnp.arange(T)[None], (B, T)))[0]
    kinds = config.attention.kinds(config.depth)
    return model.norm(run_layers(model.layers, x_BTC, rows, kinds=kinds))


# The benchmark's LLaMA: whole models, and attentions alone.


def check_llama_bench(case: Golden) -> None:
    arrays, theirs = case.arrays("in"), case.arrays("param")
    assert not is_padded(arrays.get("attention_mask")), "the official code has no answer for padding"
    config = llama.config_from_hugging_face(Fields(case.config, case.name), shapes_of(theirs))
    config = dataclasses.replace(config, attention=benchmark_attention(case.config))
    if "hidden_states" in arrays:
        check_benchmark_attention(case, config)
        return
    found = load_transformer(config, llama, theirs)

    def run(model):
        logits = model(jnp.asarray(arrays["ids"]))
        return loss_of(logits, arrays), logits

    if arrays["ids"].shape[1] % config.attention.group_size:
        check_ragged_model(case, found.model)
        return
    (loss, logits), gradient = loss_and_gradient(found.model, run)
    check_close(logits, case.arrays("out")["logits"])
    check_loss_and_gradients(case, loss, lambda: found.to_official(gradient))


def check_benchmark_attention(case: Golden, config) -> None:
    arrays, expected, theirs = case.arrays("in"), case.arrays("out"), case.arrays("param")
    attention, table = LlamaAttention(config, rngs=nnx.Rngs(0)), llama.attention_table(config, "", "")
    theirs.pop("conv_mask", None)
    load(attention, table, theirs, 0, ())
    graph, state = nnx.split(attention)
    B, T, _ = arrays["hidden_states"].shape
    position_BT = np.broadcast_to(arrays.get("position_ids", np.arange(T)[None]), (B, T))
    assert (position_BT == np.arange(T)).all()
    rows = place(None, (B, T))
    turn = rotation(config.rope, rows.position_BT, config.head_size, config.positions)

    def attend(layer, x):
        q, k, v = layer.project(x, turn)
        return layer.mixing(q, k, v, rows), v

    x = jnp.asarray(arrays["hidden_states"])
    if T % config.attention.group_size:
        y, v = attend(attention, x)
        assert np.isfinite(attention.join(y)).all()
        wrong = as_in_the_benchmark(y, v, theirs["dwconv.weight"], config.attention.group_size)
        np.testing.assert_allclose(attention.join(wrong), expected["attn_output"], rtol=0, atol=LOGITS)
        return

    def run(state, x):
        layer = nnx.merge(graph, state)
        y = layer.join(attend(layer, x)[0])
        return jnp.sum(y * arrays["cotangent"]), y

    (loss, y), (gradient, gradient_x) = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(state, x)
    check_close(y, expected["attn_output"])
    named = to_theirs(table, parameters_by_path(nnx.merge(graph, gradient)), 0)
    check_loss_and_gradients(case, loss, lambda: named)
    check_gradients({"x": np.asarray(gradient_x)}, {"x": case.arrays("gradin")["hidden_states"]})


def check_ragged_model(case: Golden, model: Llama) -> None:
    """Ours is finite, and the official numbers where its layers have the official faults."""
    ids, expected = jnp.asarray(case.arrays("in")["ids"]), case.arrays("out")
    assert np.isfinite(model(ids)).all()
    x, rows, *shared = model.begin(ids, None)
    for layer, part in enumerate(each_layer(model.layers, model.config.depth)):
        q, k, v = part.project(x, WHOLE, *shared)
        weight = case.arrays("param")[f"model.layers.{layer}.self_attn.dwconv.weight"]
        y = as_in_the_benchmark(part.holder().mixing(q, k, v, rows), v, weight, model.config.attention.group_size)
        x = part.feed(x + part.join(y))
        if f"layer{layer}" in expected:
            np.testing.assert_allclose(x, expected[f"layer{layer}"], rtol=0, atol=LOGITS)
    np.testing.assert_allclose(model.head(model.norm(x)), expected["logits"], rtol=0, atol=LOGITS)


def as_in_the_benchmark(y_BTHE, v_BTKE, weight: np.ndarray, group: int):
    """Outputs of heads as the official benchmark makes them of rows that are no multiple of a group.

    It normalises zeros, which makes the last group NaN, and adds the convolution at the last token to every row.
    """
    y_BTHE, v_BTKE = np.array(y_BTHE), np.asarray(v_BTKE)
    conv = official_conv(np.repeat(v_BTKE, y_BTHE.shape[2] // v_BTKE.shape[2], axis=2), weight)
    y_BTHE += conv[:, -1:] - conv
    y_BTHE[:, y_BTHE.shape[1] // group * group :] = np.nan
    return jnp.asarray(y_BTHE)


def official_conv(v_BTHE: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The official convolution, tap by tap: tap h is the current token."""
    h, T = weight.shape[2] // 2, v_BTHE.shape[1]
    y = np.zeros_like(v_BTHE)
    for tap in range(h + 1):
        back = h - tap
        y[:, back:] += weight[:, 0, tap, 0][None, None, :, None] * v_BTHE[:, : max(T - back, 0)]
    return y


# Hugging Face's own models.


def check_hf(case: Golden) -> None:
    source = read_hugging_face(case.path)
    assert source.config.attention.kind == "softmax"
    model, arrays, expected = source.model(), case.arrays("in"), case.arrays("out")
    ids, mask = jnp.asarray(arrays["input_ids"]), arrays.get("attention_mask")
    segment_ids = None if mask is None else jnp.asarray(mask, jnp.int32)
    if model.reads_source:
        check_hf_source(case, source, model)
        return

    types = {"token_types_BT": jnp.asarray(arrays["token_type_ids"])} if model.has_token_types else {}
    predicts_next = isinstance(model, Decoder)

    def run(model):
        if getattr(source.config, "labels", 0):
            logits = model.classify(ids, segment_ids, **types)
        elif mask is not None and "labels" in arrays and (arrays["labels"] != -100)[~real].any():
            logits = model.head(features_beside_padding(model, ids, segment_ids, types))
        else:
            logits = model.head(model.features(ids, segment_ids, **types))
        # Masked tokens are predicted where they stand.
        masked = not predicts_next and logits.ndim == 3
        return cross_entropy(logits, arrays["labels"]) if masked else loss_of(logits, arrays), logits

    real = np.ones(ids.shape, bool) if mask is None else mask.astype(bool)
    (loss, logits), gradient = loss_and_gradient(model, run)
    check_close(logits, expected["logits"], where=real if logits.ndim == 3 else ...)
    check_loss_and_gradients(case, loss, lambda: gradients_in_transformers(case, source.config, gradient))
    if "hidden_states_0" in expected:
        check_hidden_states(model, ids, segment_ids, types, expected, real)
    if "greedy_ids" in expected:
        check_greedy(model, case.config, np.asarray(ids), real, expected["greedy_ids"])


def gradients_in_transformers(case: Golden, config, gradient) -> dict[str, np.ndarray]:
    """Our gradients by their names; PyTorch's embedding has none for looking up the padding of a BERT."""
    table = conversion_of(config).name_table(config)
    named, name = to_theirs(table, parameters_by_path(gradient), config.depth), "bert.embeddings.word_embeddings.weight"
    if name in named:
        named[name] = np.array(named[name])
        named[name][case.config["pad_token_id"]] = case.arrays("grad")[name][case.config["pad_token_id"]]
    return named


def features_beside_padding(model, ids, mask, types):
    """The features where padding has some too: of a row's positions, from what is real, as transformers has it."""
    rows, real = place(None, ids.shape, heads="heads"), place(mask, ids.shape, heads="heads")
    x = model.embed(ids, rows.position_BT, **types)
    for layer in each_layer(model.layers, model.config.depth):
        x = layer.feed(x + layer.join(layer.mixing(*layer.project(x, WHOLE), rows, real)))
    return x


def check_hidden_states(model, ids, segment_ids, types, expected: Mapping[str, np.ndarray], real: np.ndarray) -> None:
    """Compare what goes from layer to layer; of a model that predicts the next token, its norm's output comes last."""
    if isinstance(model, Decoder):
        x, *shared = model.begin(ids, segment_ids)
        found = hidden_states(model.layers, model.layer_kinds, model.norm, x, *shared)
    else:
        rows, kinds = place(segment_ids, ids.shape, heads="heads"), model.config.attention.kinds(model.config.depth)
        x = model.embed(ids, rows.position_BT, **types)
        found = hidden_states(model.layers, kinds, lambda x: x, x, rows)
    for i, hidden in enumerate(found):
        check_close(hidden, expected[f"hidden_states_{i}"], where=real)


def check_hf_source(case: Golden, source: ModelWeights, model: T5) -> None:
    arrays, expected = case.arrays("in"), case.arrays("out")
    (loss, logits), gradient = loss_and_gradient(model, lambda model: read_source(model, arrays))
    check_close(logits, expected["logits"])
    table = conversion_of(source.config).name_table(source.config)
    check_loss_and_gradients(case, loss, lambda: to_theirs(table, parameters_by_path(gradient), source.config.depth))
    ids, mask, labels = (jnp.asarray(arrays[name]) for name in ("input_ids", "attention_mask", "labels"))
    target = shift_right(jnp.where(labels == -100, 0, labels), None, source.config.start_token)
    x, *shared = model.begin_source(ids, mask, WHOLE)
    encoder = hidden_states(model.encoder_layers, model.encoder_kinds, model.encoder_norm, x, *shared)
    for i, hidden in enumerate(encoder):
        check_close(hidden, expected[f"encoder_hidden_states_{i}"], where=np.asarray(mask, bool))
    y, *shared = model.begin(target, None)
    decoder = hidden_states(model.layers, model.layer_kinds, model.norm, y, *shared, model.encode(ids, mask))
    for i, hidden in enumerate(decoder):
        check_close(hidden, expected[f"decoder_hidden_states_{i}"])
    if "greedy_ids" in expected:
        check_greedy(model, case.config, np.asarray(ids), np.asarray(mask, bool), expected["greedy_ids"])


def hidden_states(layers: Any, kinds: Sequence[Any], norm: Callable[[Any], Any], x: Any, *shared: Any) -> list[Any]:
    """What transformers calls so: what each layer reads, and last what the norm gives."""
    states = [x]
    for kind, layer in zip(kinds, each_layer(layers, len(kinds)), strict=True):
        states.append(layer.of_kind(kind)(states[-1], *shared))
    return [*states[:-1], norm(states[-1])]


def check_greedy(model, values: Mapping[str, Any], ids: np.ndarray, real: np.ndarray, expected: np.ndarray) -> None:
    """Tokens, up to the end of a text."""
    ends = np.atleast_1d(values.get("eos_token_id") or -1)
    # What is generated goes on where the prompt ends; a target begins with one token of its own.
    given = 1 if model.reads_source else ids.shape[1]
    config = GenerateConfig(max_new_tokens=expected.shape[1] - given)
    found = generate_tokens(model, config, [row[mask] for row, mask in zip(ids, real, strict=True)])
    for generated, wanted in zip(found, expected[:, given:], strict=True):
        stop = next((i + 1 for i, token in enumerate(wanted) if token in ends), len(wanted))
        np.testing.assert_array_equal(generated.tokens[:stop], wanted[:stop])


# T5.


def check_t5(case: Golden) -> None:
    values, arrays, theirs = case.config, case.arrays("in"), case.arrays("param")
    if values["tie_word_embeddings"] and t5.HEAD in theirs:
        np.testing.assert_array_equal(theirs.pop(t5.HEAD), theirs[t5.EMBEDDING])
    config = t5.config_from_hugging_face(Fields(values, case.name), shapes_of(theirs))
    config = dataclasses.replace(config, **t5_attentions(values["flags"]))
    found = load_transformer(config, t5, theirs)
    run = classify_source if config.labels else read_source
    (loss, logits), gradient = loss_and_gradient(found.model, lambda model: run(model, arrays))
    check_close(logits, case.arrays("out")["logits"])
    check_parts_of_layers(case, found.model)
    check_loss_and_gradients(case, loss, lambda: found.to_official(gradient))


def check_parts_of_layers(case: Golden, model: T5) -> None:
    """Compare what each attention adds, and what each layer gives, with what the official code's do."""
    arrays, expected = case.arrays("in"), case.arrays("out")
    source, mask = jnp.asarray(arrays["ids"]), jnp.asarray(arrays["attention_mask"])
    labels = arrays["ids"] if model.config.labels else arrays["labels"]
    target = shift_right(jnp.where(labels == -100, 0, labels), None, model.config.start_token)
    real = np.asarray(mask, bool)

    x, rows, bias = model.begin_source(source, mask, WHOLE)
    for i, layer in enumerate(each_layer(model.encoder_layers, model.config.encoder_depth)):
        layer = layer.of_kind(model.encoder_kinds[i])
        check_close(layer.attend(x, rows, bias), expected[f"enc_selfattn{i}"], where=real)
        x = layer(x, rows, bias)
        check_close(x, expected[f"enc_block{i}"], where=real)

    memory = model.encode(source, mask)
    y, rows, bias = model.begin(target, None)
    for i, layer in enumerate(each_layer(model.layers, model.config.depth)):
        layer = layer.of_kind(model.layer_kinds[i])
        check_close(layer.attend(y, rows, bias), expected[f"dec_selfattn{i}"])
        read = layer.read(y + layer.attend(y, rows, bias), rows, memory)
        check_close(read, expected[f"dec_cross{i}"])
        y = layer(y, rows, bias, memory)
        check_close(y, expected[f"dec_block{i}"])


def classify_source(model: T5, arrays: Mapping[str, np.ndarray]):
    logits = model.classify(jnp.asarray(arrays["ids"]), jnp.asarray(arrays["attention_mask"]))
    return loss_of(logits, arrays), logits


def read_source(model: T5, arrays: Mapping[str, np.ndarray]):
    """The loss of the targets, of which -100 is no token, and their logits."""
    ids = arrays.get("ids", arrays.get("input_ids"))
    mask, labels = arrays.get("attention_mask"), arrays["labels"]
    target = shift_right(jnp.where(labels == -100, 0, labels), None, model.config.start_token)
    memory = model.encode(jnp.asarray(ids), None if mask is None else jnp.asarray(mask))
    logits = model.head(model.features(target, memory=memory))
    return cross_entropy(logits, labels), logits


# Medusa.


@dataclasses.dataclass(frozen=True)
class Speculation:
    """The backbone and the heads of a case, and its tree."""

    model: Llama
    heads: Any
    tree: Tree
    heads_in_file: dict[str, np.ndarray]


def load_medusa(case: Golden) -> Speculation:
    values, theirs = case.config, case.arrays("param")
    backbone = {k.removeprefix("base_model."): x for k, x in theirs.items() if k.startswith("base_model.")}
    # The official code ignores rope_theta.
    config = llama.config_from_hugging_face(Fields(values | {"rope_theta": 10000.0}, case.name), shapes_of(backbone))
    attention = medusa_attention(values["flags"], shapes_of(backbone))
    found = load_transformer(dataclasses.replace(config, attention=attention), llama, backbone)
    heads = {k: x for k, x in theirs.items() if k.startswith("medusa_head.")}
    # All blocks of a head are one, which a file may hold once.
    for name in [name for name in heads if ".0.linear." in name]:
        for block in range(1, values["medusa_num_layers"]):
            heads.setdefault(name.replace(".0.linear.", f".{block}.linear."), heads[name])
    return Speculation(found.model, heads_from_official(heads), tree_from_paths(values["choices"]), heads)


def check_tree_buffers(tree: Tree, top: int, expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(expected["buf_medusa_attn_mask"][0, 0] != 0, tree.ancestor_MM)
    np.testing.assert_array_equal(expected["buf_medusa_position_ids"], tree.depth_M)
    guess_M = top * (tree.depth_M - 1) + np.array(tree.ranks) + 1
    np.testing.assert_array_equal(expected["buf_tree_indices"], np.where(tree.depth_M == 0, 0, guess_M))
    leaves = tree.leaves[::-1]
    past = np.arange(tree.height)[None] > tree.depth_M[leaves][:, None]
    np.testing.assert_array_equal(expected["buf_retrieve_indices"], np.where(past, -1, tree.path_MQ[leaves]))


def check_acceptance(tree: Tree, expected: dict[str, np.ndarray]) -> None:
    """The accepted tokens, for each way that the case stores; its name says temperature, threshold and alpha."""
    tokens_BM, logits_BMV = (jnp.asarray(expected[name]) for name in ("tree_candidates", "tree_logits"))
    for name in expected:
        if not name.startswith("accepted_tokens_"):
            continue
        ways = re.fullmatch(r"accepted_tokens_(greedy|typical_T([\d.]+?)(?:_thr([\d.]+)_alpha([\d.]+))?)", name)
        assert ways is not None, f"{name} is no known way to accept"
        if ways[1] == "greedy":
            node_B = accept_exact(tree, tokens_BM, jnp.argmax(logits_BMV, axis=-1))
        else:
            threshold, alpha = float(ways[3] or 0.09), float(ways[4] or 0.3)
            node_B = accept_typical(tree, tokens_BM, logits_BMV / float(ways[2]), threshold=threshold, alpha=alpha)
        path = tree.path_MQ[node_B[0]][: tree.depth_M[node_B[0]] + 1]
        np.testing.assert_array_equal(tokens_BM[0, path], expected[name], err_msg=name)


def check_medusa(case: Golden) -> None:
    """The official tree is exact inside the context's group; past its end it lacks the group that has just ended."""
    found, expected = load_medusa(case), case.arrays("out")
    check_medusa_speaks(case, found)
    model, tree = found.model, found.tree
    check_tree_buffers(tree, case.config["TOPK"], expected)
    check_acceptance(tree, expected)
    ids = jnp.asarray(case.arrays("in")["ids"])
    length = ids.shape[1]
    capacity = length + tree.nodes
    x_BTC, state = jax.jit(lambda ids: model.forward(ids, model.empty_state(1, capacity)))(ids)
    logits_BTV, guesses_BKV = model.head(x_BTC), found.heads(x_BTC[:, -1])
    check_close(logits_BTV, expected["prefill_logits"])
    check_close(guesses_BKV[0], expected["prefill_medusa_logits_last"][:, 0])
    tokens_BM = from_heads(guesses_BKV, jnp.argmax(logits_BTV[:, -1], axis=-1), tree)
    np.testing.assert_array_equal(tokens_BM, expected["tree_candidates"])

    verified = jax.jit(lambda tokens, state: model.head(model.verify(tokens, tree, state)[0]))
    ours, theirs = verified(tokens_BM, state)[0], expected["tree_logits"][0]
    rows = np.concatenate([np.repeat(ids, tree.nodes, axis=0), np.asarray(tokens_BM)[0][tree.path_MQ]], axis=1)
    recomputed = jax.jit(model)(jnp.asarray(rows))[np.arange(tree.nodes), length + tree.depth_M]
    check_close(ours, np.asarray(recomputed))
    attention = model.config.attention
    if attention.kind == "softmax":
        check_close(ours, theirs)
        return
    G, weight = attention.group_size, np.array(1.0)
    if attention.grouped and attention.grouped_weight == "learned":
        weight = np.asarray(parameters_by_path(model)["layers.attention.mixing.alpha"])
    inside_M, beside_M = (length % G + tree.depth_M < groups * G for groups in (1, 2))
    exact_M = inside_M if attention.grouped else beside_M
    check_close(ours, theirs, where=exact_M)
    if (beside_M & ~exact_M).any() and weight.any():
        assert np.abs(ours - theirs)[beside_M & ~exact_M].max() > LOGITS
    # Without the tokens that have left the window and are not folded yet, ours are the official numbers everywhere
    # but two groups on, where the official window is too long.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_far", lambda tree, distances, R: jnp.zeros((1, 1, 1, 1, 1), bool))
        official = jax.jit(lambda tokens, state: model.head(model.verify(tokens, tree, state)[0]))
        check_close(official(tokens_BM, state)[0], theirs, where=beside_M)


def check_medusa_speaks(case: Golden, found: Speculation) -> None:
    """Greedy generation with the heads gives the official tokens of plain recomputation; heads go back bit for bit."""
    ids = case.arrays("in")["ids"]
    expected = case.arrays("out")["plain_greedy_ids_full_recompute"][0, ids.shape[1] :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TREES, "of the case", found.tree)
        config = GenerateConfig(max_new_tokens=len(expected), draft="medusa", tree="of the case")
        [row] = generate_tokens(found.model, config, list(ids), heads=found.heads)
    np.testing.assert_array_equal(row.tokens, expected)
    for name, array in heads_to_official(found.heads).items():
        np.testing.assert_array_equal(array, found.heads_in_file[f"medusa_head.{name}"])


CHECKS: dict[str, Callable[[Golden], None]] = {
    "flash": check_flash,
    "llama_train": check_llama_train,
    "llama_bench": check_llama_bench,
    "gpt2": check_gpt2,
    "hf": check_hf,
    "medusa": check_medusa,
    "t5": check_t5,
}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_golden(case: Golden) -> None:
    later = [name for name in families(case) if name in LATER]
    if later:
        pytest.skip(f"{later[0]}: {LATER[later[0]]} are of a later step")
    assert case.family in CHECKS, f"no test reads the family {case.family}"
    CHECKS[case.family](case)


def test_golden_directory() -> None:
    if not directory().is_dir():
        pytest.skip(f"no golden directory at {directory()}: set LIN_JAX_GOLDEN; only the fixtures were compared")
    assert any(case.path.is_relative_to(directory()) for case in CASES), f"{directory()} holds no case"
