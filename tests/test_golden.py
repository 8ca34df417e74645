"""Agreement with numbers of the official code, case by case; an id begins with the name of the case's file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lin_jax.convert import gpt2, llama
from lin_jax.convert.flash import config_from_official, from_official, to_official
from lin_jax.convert.hugging_face import read_hugging_face
from lin_jax.convert.medusa import heads_from_official, heads_to_official
from lin_jax.convert.names import load, to_theirs
from lin_jax.decode.accept import accept_exact, accept_typical
from lin_jax.decode.draft import from_heads
from lin_jax.decode.generate import generate_tokens
from lin_jax.experiment import AttentionConfig, AugmentedConfig, GenerateConfig, LongloraConfig, preset_attention
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.layers.rope import rotation
from lin_jax.layers.rows import place
from lin_jax.models.gpt2 import Gpt2
from lin_jax.models.llama import Llama, LlamaAttention
from lin_jax.ops.linear_attention import verify
from lin_jax.ops.tree import TREES, Tree, tree_from_paths
from tests.golden import Golden, directory, golden_cases

CASES = golden_cases()


def flash_loss(model, case: Golden, inputs: dict) -> tuple[jax.Array, jax.Array]:
    """The loss as the case defines it, and the logits that it stores."""
    ids = jnp.asarray(inputs["ids"])
    if case.info["config"]["autoregressive_wrapper"]:
        logits = model(ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean(), logits
    mask = jnp.asarray(inputs["mask"], jnp.int32) if "mask" in inputs else None
    logits = model(ids, mask)
    return jnp.sum(logits * inputs["cotangent"]), logits


def check_flash(case: Golden) -> None:
    official = case.info["config"]
    model = from_official(config_from_official(official), case.arrays("param"), official["kernel"])
    graph, state, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(state):
        return jax.value_and_grad(lambda s: flash_loss(nnx.merge(graph, s, rest), case, inputs), has_aux=True)(state)

    inputs, expected = case.arrays("in"), case.arrays("out")
    (loss, logits), gradient = run(state)
    assert np.abs(logits - expected["logits"]).max() < 1e-4
    assert abs(float(loss) - float(expected["loss"])) < 1e-5 * max(1.0, abs(float(expected["loss"])))
    model_of_gradient = nnx.merge(graph, gradient, rest)
    ours = to_official(model_of_gradient, official["kernel"], parameters_by_path(model_of_gradient))
    theirs = case.arrays("grad")
    for name, expected_gradient in theirs.items():
        if name not in ours:
            assert not expected_gradient.any() or name.endswith("dwconv.weight"), name
            continue
        actual = ours[name]
        if name.endswith("dwconv.weight"):
            # The official mask acts outside autograd, so masked taps hold gradients that mean nothing.
            used = official["kernel"] // 2 + 1
            actual, expected_gradient = actual[:, :, :used], expected_gradient[:, :, :used]
        scale = np.abs(expected_gradient).max()
        assert np.abs(actual - expected_gradient).max() <= 1e-3 * max(scale, 1e-7), name
    for name in ours.keys() - theirs.keys():
        assert not ours[name].any(), f"{name} has a gradient that the official code does not have"


def attention_of(case: Golden) -> AttentionConfig:
    """What the flags of the official LLaMA and GPT-2 code mean."""
    values = case.info["config"]
    flags, taps = values.get("flags", {}), (values.get("conv_kernel") or 0) // 2 + 1
    if case.family == "llama_bench":
        return AugmentedConfig(
            group_size=values["group_size"], convolution=values["res_kernel_size"] // 2 + 1, grouped_weight="one"
        )
    if case.family == "gpt2":
        kinds = {"LOCAL_ATTN": "local", "GLOBAL_ATTN": "grouped", "BOTH_ATTN": "local_grouped", "AUG": "augmented"}
        kind = next((kinds[flag] for flag in kinds if flags[flag]), "softmax")
        weight = "learned" if kind == "augmented" else "one"
        base = AugmentedConfig(group_size=flags["GROUP_SIZE"], convolution=taps, grouped_weight=weight)
        return preset_attention(base, kind)
    if not flags["USE_LINEAR"]:
        return LongloraConfig(split=flags["split"], shift="released")
    return AugmentedConfig(
        group_size=flags["GROUP_SIZE"],
        grouped=bool(flags["USE_GLOBAL"]),
        convolution=taps if flags["ADD_CONV"] or flags["USE_CASTLING"] else 0,
        castling=bool(flags["USE_CASTLING"]),
        grouped_weight="learned" if flags["GLOBAL_FACTOR"] else "one",
        local_weight="learned" if flags["LOCAL_FACTOR"] else "one",
        normalise_grouped=bool(flags["NORM_GLOBAL"]),
    )


def load_transformer(case: Golden):
    """Our model with a case's parameters, and its table of names."""
    family, make = (gpt2, Gpt2) if "gpt2" in case.name else (llama, Llama)
    theirs = case.arrays("param")
    shapes = {name: array.shape for name, array in theirs.items()}
    config = family.config_from_hugging_face(case.info["config"], shapes)
    config = dataclasses.replace(config, attention=attention_of(case))
    model = make(config, rngs=nnx.Rngs(0))
    load(model, family.name_table(config), theirs, config.depth, family.ignored(config))
    return model, family.name_table(config)


def check_transformer(case: Golden) -> None:
    model, table = load_transformer(case)
    graph, state = nnx.split(model)
    inputs, expected = jax.tree.map(jnp.asarray, case.arrays("in")), case.arrays("out")

    @jax.jit
    def run(state):
        def loss(state):
            model = nnx.merge(graph, state)
            if "labels" in inputs:
                logits = model.classify(inputs["ids"], inputs["attention_mask"])
                return optax.softmax_cross_entropy_with_integer_labels(logits, inputs["labels"]).mean(), logits
            logits = model(inputs["ids"])
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], inputs["ids"][:, 1:]).mean(), logits

        return jax.value_and_grad(loss, has_aux=True)(state)

    (loss, logits), gradient = run(state)
    assert np.abs(logits - expected["logits"]).max() < 1e-4
    assert abs(float(loss) - float(expected["loss"])) < 1e-5 * max(1.0, abs(float(expected["loss"])))
    ours = to_theirs(table, parameters_by_path(nnx.merge(graph, gradient)), model.config.depth)
    if getattr(model.config.attention, "normalise_grouped", False):
        check_normalised_sum(case, ours)
        return
    compare_gradients(ours, case.arrays("grad"))


def check_normalised_sum(case: Golden, ours: dict) -> None:
    """With NORM_GLOBAL the stored gradients hold rounding of the official code that the equations do not have.

    The first group sees no group before it: its sum is 0, and there x / (1e-5 + |x|) has a derivative of 1e5. The
    official sum "all up to one's own, minus one's own" adds what comes through it to the others, and takes it off
    again: what is left of float32 are errors of order 1e-2, in what concerns the keys and values of the first group.
    """
    torch = pytest.importorskip("torch")
    from tests.normalised_sum import gradients

    values, ids, theirs = case.info["config"], case.arrays("in")["ids"], case.arrays("grad")
    params = {name: array for name, array in case.arrays("param").items() if not name.endswith("conv_mask")}
    exact, inputs = gradients(params, ids, values, minus_own=False, dtype=torch.float64)
    compare_gradients(ours, exact)
    compare_gradients(gradients(params, ids, values, minus_own=True, dtype=torch.float64)[0], exact, 1e-8)
    compare_gradients(gradients(params, ids, values, minus_own=False, dtype=torch.float32)[0], exact, 1e-4)
    rounded = [minus_own_errors(gradients, params, ids, values, seed) for seed in range(4)]
    for name, error in errors(theirs, exact).items():
        # What the official form loses in float32 depends on the last bit of every number before it.
        possible = max(np.abs(other[name]).max() for other in rounded)
        assert np.abs(error).max() <= 3 * possible + 1e-5 * np.abs(exact[name]).max(), name
    for layer, x_NC in enumerate(inputs):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        for error in (errors(theirs, exact)[name], rounded[0][name]):
            assert np.abs(error).max() > 5e-3 * np.abs(exact[name]).max()
            assert share_outside(error, x_NC[: values["flags"]["GROUP_SIZE"]]) < 1e-2


def minus_own_errors(gradients, params: dict, ids: np.ndarray, values: dict, seed: int) -> dict:
    """What float32 changes in the official form, at parameters that differ in their last bits."""
    import torch

    random = np.random.default_rng(seed)
    moved = {name: array * (1 + 1e-6 * random.standard_normal(array.shape)) for name, array in params.items()}
    exact, _ = gradients(moved, ids, values, minus_own=False, dtype=torch.float64)
    return errors(gradients(moved, ids, values, minus_own=True, dtype=torch.float32)[0], exact)


def errors(actual: dict, expected: dict) -> dict:
    return {name: used_taps(name, actual[name]) - used_taps(name, expected[name]) for name in expected}


def share_outside(matrix_OC: np.ndarray, rows_NC: np.ndarray) -> float:
    """How much of a gradient of x -> W x does not come from the given x."""
    basis, _ = np.linalg.qr(rows_NC.T)
    return float(np.linalg.norm(matrix_OC - matrix_OC @ basis @ basis.T) / np.linalg.norm(matrix_OC))


def used_taps(name: str, gradient: np.ndarray) -> np.ndarray:
    """The official mask acts outside autograd, so masked taps hold gradients that mean nothing."""
    return gradient[:, :, : gradient.shape[2] // 2 + 1] if "dwconv" in name or "dconv_ada" in name else gradient


def compare_gradients(ours: dict, theirs: dict, tolerance: float = 1e-3) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        actual, expected = used_taps(name, ours[name]), used_taps(name, expected)
        assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-7), name


def official_conv(v_BTHE: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The official convolution, tap by tap: tap h is the current token."""
    h, T = weight.shape[2] // 2, v_BTHE.shape[1]
    y = np.zeros_like(v_BTHE)
    for tap in range(h + 1):
        back = h - tap
        y[:, back:] += weight[:, 0, tap, 0][None, None, :, None] * v_BTHE[:, : T - back]
    return y


def check_llama_bench(case: Golden) -> None:
    if "model" in case.name:
        check_transformer(case)
        return
    values, inputs, expected = case.info["config"], case.arrays("in"), case.arrays("out")
    config = llama.config_from_hugging_face(values | {"intermediate_size": 8}, {})
    config = dataclasses.replace(config, attention=attention_of(case))
    attention = LlamaAttention(config, rngs=nnx.Rngs(0))
    table = llama.attention_table(config, "", "")
    theirs = {name: array for name, array in case.arrays("param").items() if name != "conv_mask"}
    load(attention, table, theirs, 0, ())
    graph, state = nnx.split(attention)
    B, T, _ = inputs["hidden_states"].shape
    rows = place(None, (B, T))
    turn = rotation(config.rope, rows.position_BT, config.head_size, config.positions)

    def loss(state, x):
        layer = nnx.merge(graph, state)
        y = layer.join(layer.mixing(*layer.project(x, turn), rows))
        return jnp.sum(y * inputs["cotangent"]), y

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, y), (gradient, gradient_x) = run(state, jnp.asarray(inputs["hidden_states"]))
    y = np.asarray(y)
    if not case.name.endswith("NaN"):
        assert np.abs(y - expected["attn_output"]).max() < 1e-4
        compare_gradients(to_theirs(table, parameters_by_path(nnx.merge(graph, gradient)), 0), case.arrays("grad"))
        theirs_x = case.arrays("gradin")["hidden_states"]
        assert np.abs(gradient_x - theirs_x).max() <= 1e-3 * np.abs(theirs_x).max()
        return
    # For a length that is no multiple of the group the official code normalises zeros, which makes the last group NaN,
    # and adds the convolution at the last token to every row. Ours is finite, and equal but for that in other rows.
    assert np.isfinite(y).all()
    v_BTHE = (inputs["hidden_states"] @ theirs["v_proj.weight"].T).reshape(B, T, config.heads, -1)
    conv = official_conv(v_BTHE, theirs["dwconv.weight"])
    difference = (conv[:, -1:] - conv).reshape(B, T, -1) @ theirs["o_proj.weight"].T
    full = T // config.attention.group_size * config.attention.group_size
    assert np.abs(y + difference - expected["attn_output"])[:, :full].max() < 1e-4
    assert np.isnan(expected["attn_output"][:, full:]).all()


def check_hugging_face(case: Golden) -> None:
    if case.name not in HUGGING_FACE:
        pytest.skip(f"{case.name} is not built yet")
    source = read_hugging_face(case.path)
    assert source.config.attention.kind == "softmax"
    model = source.model()
    with np.load(case.path / "golden.npz") as file:
        ids, labels, mask = (file.get(f"in/{name}") for name in ("input_ids", "labels", "attention_mask"))
        expected, loss = file["out/logits"], float(file["out/loss"])
    logits = np.asarray(model(jnp.asarray(ids), None if mask is None else jnp.asarray(mask, jnp.int32)))
    real = np.ones(ids.shape, bool) if mask is None else mask.astype(bool)
    assert np.abs(logits - expected)[real].max() < 1e-4
    weights = labels[:, 1:] != -100
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], np.where(weights, labels[:, 1:], 0))
    assert abs(float((losses * weights).sum() / weights.sum()) - loss) < 1e-5 * max(1.0, loss)


def load_medusa(case: Golden):
    """The backbone and the heads of a case, and its tree."""
    values, theirs = case.info["config"], case.arrays("param")
    backbone = {k.removeprefix("base_model."): x for k, x in theirs.items() if k.startswith("base_model.")}
    flags = values["flags"]
    attention = AugmentedConfig(
        group_size=flags["GROUP_SIZE"],
        grouped=bool(flags["USE_GLOBAL"]),
        grouped_weight="learned" if flags["GLOBAL_FACTOR"] else "one",
        convolution=values["conv_kernel"] // 2 + 1,
    )
    config = dataclasses.replace(llama.config_from_hugging_face(values, {}), attention=attention)
    model = Llama(config, rngs=nnx.Rngs(0))
    load(model, llama.name_table(config), backbone, config.depth, llama.ignored(config))
    heads = heads_from_official({k: x for k, x in theirs.items() if k.startswith("medusa_head.")})
    return model, heads, tree_from_paths(values["choices"])


def check_tree_buffers(tree: Tree, top: int, expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(expected["buf_medusa_attn_mask"][0, 0] != 0, tree.ancestor_MM)
    np.testing.assert_array_equal(expected["buf_medusa_position_ids"], tree.depth_M)
    guess_M = top * (tree.depth_M - 1) + np.array(tree.ranks) + 1
    np.testing.assert_array_equal(expected["buf_tree_indices"], np.where(tree.depth_M == 0, 0, guess_M))
    leaves = tree.leaves[::-1]
    past = np.arange(tree.height)[None] > tree.depth_M[leaves][:, None]
    np.testing.assert_array_equal(expected["buf_retrieve_indices"], np.where(past, -1, tree.path_MP[leaves]))


def check_acceptance(tree: Tree, expected: dict[str, np.ndarray]) -> None:
    tokens_BM, logits_BMV = (jnp.asarray(expected[name]) for name in ("tree_candidates", "tree_logits"))
    typical = lambda threshold, alpha: accept_typical(  # noqa: E731
        tree, tokens_BM, logits_BMV / 0.7, threshold=threshold, alpha=alpha
    )
    for name, node_B in {
        "greedy": accept_exact(tree, tokens_BM, jnp.argmax(logits_BMV, axis=-1)),
        "typical_T0.7": typical(0.09, 0.3),
        "typical_T0.7_thr.3_alpha.09": typical(0.3, 0.09),
    }.items():
        path = tree.path_MP[node_B[0]][: tree.depth_M[node_B[0]] + 1]
        np.testing.assert_array_equal(tokens_BM[0, path], expected[f"accepted_tokens_{name}"], err_msg=name)


def check_medusa(case: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """The official tree is exact inside the context's group; past its end it lacks the group that has just ended."""
    (model, heads, tree), expected = load_medusa(case), case.arrays("out")
    check_tree_buffers(tree, case.info["config"]["TOPK"], expected)
    check_acceptance(tree, expected)
    ids = jnp.asarray(case.arrays("in")["ids"])
    G, length = model.config.attention.group_size, ids.shape[1]
    x_BTC, state = jax.jit(lambda ids: model.forward(ids, model.empty_state(1, 0)))(ids)
    logits_BTV, guesses_BKV = model.head(x_BTC), heads(x_BTC[:, -1])
    assert np.abs(logits_BTV - expected["prefill_logits"]).max() < 1e-4
    assert np.abs(guesses_BKV[0] - expected["prefill_medusa_logits_last"][:, 0]).max() < 1e-4
    tokens_BM = from_heads(guesses_BKV, jnp.argmax(logits_BTV[:, -1], axis=-1), tree)
    np.testing.assert_array_equal(tokens_BM, expected["tree_candidates"])

    verified = jax.jit(lambda tokens, state: model.head(model.verify(tokens, tree, state)[0]))
    ours, theirs = verified(tokens_BM, state)[0], expected["tree_logits"][0]
    rows = np.concatenate([np.repeat(ids, tree.nodes, axis=0), np.asarray(tokens_BM)[0][tree.path_MP]], axis=1)
    recomputed = jax.jit(model)(jnp.asarray(rows))[np.arange(tree.nodes), length + tree.depth_M]
    assert np.abs(ours - recomputed).max() < 1e-4
    inside_M = length % G + tree.depth_M < G
    exact_M = inside_M if model.config.attention.grouped else np.ones_like(inside_M)
    assert np.abs(ours - theirs)[exact_M].max() < 1e-4
    assert exact_M.all() or np.abs(ours - theirs)[~exact_M].max() > 0.1
    # Without the tokens that have left the window and are not folded yet, ours are the official numbers everywhere.
    monkeypatch.setattr(verify, "_far", lambda tree, distances, R: jnp.zeros((1, 1, 1, 1, 1), bool))
    official = jax.jit(lambda tokens, state: model.head(model.verify(tokens, tree, state)[0]))
    assert np.abs(official(tokens_BM, state)[0] - theirs).max() < 1e-4


HUGGING_FACE = ("hf__llama_gqa_linear_scaling2", "hf__llama_gqa_theta500k", "hf__llama_mha", "hf__gpt2_lm")
CHECKS = {
    "flash": check_flash,
    "llama_train": check_transformer,
    "llama_bench": check_llama_bench,
    "gpt2": check_transformer,
    "hf": check_hugging_face,
}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_golden(case: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.family == "medusa":
        check_medusa(case, monkeypatch)
        return
    if case.family not in CHECKS:
        pytest.skip(f"family {case.family} is not built yet")
    CHECKS[case.family](case)


def test_golden_directory() -> None:
    if not directory().is_dir():
        pytest.skip(f"no golden directory at {directory()}: set LIN_JAX_GOLDEN; only the fixtures were compared")
    assert len(CASES) >= 41


@pytest.mark.parametrize("case", [c for c in CASES if c.family == "flash"], ids=lambda case: case.name)
def test_official_names_go_back_bit_for_bit(case: Golden) -> None:
    official, theirs = case.info["config"], case.arrays("param")
    back = to_official(from_official(config_from_official(official), theirs, official["kernel"]), official["kernel"])
    for name, array in back.items():
        np.testing.assert_array_equal(array, theirs[name])


@pytest.mark.parametrize("case", [c for c in CASES if c.family == "medusa"], ids=lambda case: case.name)
def test_medusa_speaks_as_the_official_code_does(case: Golden) -> None:
    """Greedy generation with the heads gives the official tokens of plain recomputation; heads go back bit for bit."""
    model, heads, tree = load_medusa(case)
    theirs, ids = case.arrays("param"), case.arrays("in")["ids"]
    expected = case.arrays("out")["plain_greedy_ids_full_recompute"][0, ids.shape[1] :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TREES, "of the case", tree)
        config = GenerateConfig(max_new_tokens=len(expected), draft="medusa", tree="of the case")
        [row] = generate_tokens(model, config, list(ids), heads=heads)
    np.testing.assert_array_equal(row.tokens, expected)
    for name, array in heads_to_official(heads).items():
        np.testing.assert_array_equal(array, theirs[f"medusa_head.{name}"])
