"""Models that decode: chunks, trees and commits against the features of whole rows, for every kind of attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from lin_jax.attentions.registry import with_kind
from lin_jax.experiment import AugmentedConfig, ConfigError, FlashConfig, Gpt2Config, LlamaConfig, RopeConfig
from lin_jax.models.base import unstacked
from lin_jax.models.registry import create_model
from lin_jax.ops.tree import chain, tree_from_paths

pytestmark = pytest.mark.usefixtures("quick_compilation")

V, G = 20, 4
BASE = AugmentedConfig(group_size=G, convolution=6)
FLASH = {
    "plain": {},
    "laplace_two_groups": {"local": "laplace", "local_groups": 2, "feature_map": "elu1"},
    "castling": {"castling": True, "convolution": 3},
    "castling_alone": {"castling": True, "convolution": 0, "grouped": False},
    "fourier": {"feature_map": "fourier", "feature_size": 6},
    "favor_grouped_only": {"feature_map": "favor", "feature_size": 5, "local": "none"},
}
LLAMA = {
    "plain": {},
    "softmax": {"kind": "softmax"},
    "softmax_local": {"local": "softmax", "local_groups": 3, "feature_map": "relu"},
    "softmax_local_alone": {"local": "softmax", "grouped": False},
    "laplace": {"local": "laplace", "local_weight": "learned", "normalise_grouped": True, "local_groups": 2},
    "castling": {"castling": True, "normalise_grouped": True, "grouped_weight": "one"},
    "grouped": {"local": "none", "convolution": 0, "feature_map": "elu1"},
    "hybrid": {"softmax_layers": (1,), "local_weight": "learned"},
}
TREE = tree_from_paths([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0, 0]])
LENGTHS = np.array([9, 3, 0])


CASES = [
    (family, name)
    for family, names in (("flash", FLASH), ("llama", LLAMA), ("gpt2", ("plain", "hybrid")))
    for name in names
]


def make_config(family, attention, dtype="float32"):
    return dataclasses.replace(_in_float32(family, attention), dtype=dtype)


def _in_float32(family, attention):
    attention = with_kind(BASE, **{"kind": "augmented", **attention})
    if family == "flash":
        return FlashConfig(vocabulary_size=V, width=12, depth=2, query_key_size=6, rotary_size=4, attention=attention)
    if family == "gpt2":
        return Gpt2Config(
            vocabulary_size=V, width=16, depth=2, heads=4, feed_forward_size=20, positions=32, attention=attention
        )
    return LlamaConfig(
        vocabulary_size=V,
        width=16,
        depth=2,
        heads=4,
        key_value_heads=2,
        head_size=6,
        feed_forward_size=20,
        positions=32,
        attention=attention,
    )


def make_model(config):
    """A model whose parameters are all far from their start, the new ones too, in the type of its activations."""
    model, rng = create_model(config, nnx.Rngs(0)), np.random.default_rng(1)
    state = nnx.state(model, nnx.Param)
    changed = jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32), state)
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(config.dtype), changed))
    return model


def rows_to_nodes(prompts, tree, tokens_BM):
    """[prompt, path to the node] for all nodes of all rows."""
    paths = [tree.path_MQ[node][: tree.depth_M[node] + 1] for node in range(tree.nodes)]
    return [[*prompt, *np.asarray(tokens_BM)[b, path]] for b, prompt in enumerate(prompts) for path in paths]


def features_of(model, rows):
    """Features of each row by the training path, in one program: [rows, 24, C]."""
    padded = [[*row, *[0] * (24 - len(row))] for row in rows]
    ids = [[1] * len(row) + [0] * (24 - len(row)) for row in rows]
    return np.asarray(jax.jit(model.features)(jnp.asarray(padded, jnp.int32), jnp.asarray(ids, jnp.int32)))


@pytest.mark.parametrize(
    ("family", "name", "dtype"),
    [
        *((*case, "float32") for case in CASES),
        *(("flash", "laplace_two_groups", "bfloat16"), ("gpt2", "plain", "bfloat16")),
        *(("llama", "softmax_local", "bfloat16"), ("llama", "hybrid", "bfloat16")),
    ],
)
def test_chunks_trees_and_commits_are_the_whole_row(family, name, dtype):
    """To the rounding of float32 in bfloat16 too: on a CPU only parameters are rounded more."""
    attention = (FLASH if family == "flash" else LLAMA)[name]
    model = make_model(make_config(family, attention, dtype))
    true = make_model(make_config(family, attention))
    nnx.update(true, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(model, nnx.Param)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, V, length).tolist() for length in LENGTHS]
    nodes_BM = jnp.asarray(rng.integers(0, V, (3, TREE.nodes)))
    # The first row is padded on the right, the second on the left and inside.
    row_BT, real_BT = np.zeros((3, 12), np.int32), np.zeros((3, 12), bool)
    row_BT[0, :9], real_BT[0, :9] = prompts[0], True
    row_BT[1, [5, 9, 11]], real_BT[1, [5, 9, 11]] = prompts[1], True
    path_BP = jnp.asarray(TREE.path_MQ[[8, 5, 2]])
    count_B = jnp.array([6, 2, 0])

    @jax.jit
    def run(row_BT, real_BT, nodes_BM):
        state = model.empty_state(3, 32)
        read = []
        for start, stop in ((0, 7), (7, 12)):
            features, state = model.forward(row_BT[:, start:stop], state, real_BT[:, start:stop])
            read.append(features)
        first, pending = model.verify(nodes_BM, TREE, state)
        state = model.commit(state, pending, path_BP, count_B)
        second, _ = unstacked(model).verify(nodes_BM, TREE, state)
        return jnp.concatenate(read, axis=1), first, second

    read, first, second = (np.asarray(x) for x in run(row_BT, real_BT, nodes_BM))
    paths = [np.asarray(nodes_BM)[b, path_BP[b, : count_B[b]]].tolist() for b in range(3)]
    longer = [prompt + path for prompt, path in zip(prompts, paths, strict=True)]
    to_nodes, behind_paths = rows_to_nodes(prompts, TREE, nodes_BM), rows_to_nodes(longer, TREE, nodes_BM)
    rows = [*prompts[:2], *to_nodes, *behind_paths]
    whole = features_of(true, rows)
    np.testing.assert_allclose(read[0, :9], whole[0, :9], atol=1e-4)
    np.testing.assert_allclose(read[1, [5, 9, 11]], whole[1, :3], atol=1e-4)
    last = whole[np.arange(len(rows)), [len(row) - 1 for row in rows]]
    verified = np.concatenate([first.reshape(-1, first.shape[-1]), second.reshape(-1, second.shape[-1])])
    np.testing.assert_allclose(verified, last[2:], atol=1e-4)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_nothing_is_rounded_to_bfloat16_on_a_cpu(family, name):
    """Parameters are; what becomes of them, and of what is computed, is not, so that no sum decides a rounding."""
    model = make_model(make_config(family, (FLASH if family == "flash" else LLAMA)[name], "bfloat16"))

    def run(tokens):
        _, state = model.forward(tokens, model.empty_state(2, 32))
        x, pending = model.verify(tokens, chain(7), state)
        state = model.commit(state, pending, jnp.zeros((2, 7), jnp.int32), jnp.ones(2, jnp.int32))
        return model.head(x), state

    traced = jax.make_jaxpr(run)(jnp.zeros((2, 7), jnp.int32))
    assert not list(roundings(traced.jaxpr))
    # The training path is rounded, and it is found.
    assert list(roundings(jax.make_jaxpr(model)(jnp.zeros((2, 7), jnp.int32)).jaxpr))


def roundings(jaxpr):
    """Operations whose results are rounded to bfloat16, in programs inside of programs too."""
    moved = {"reshape", "broadcast_in_dim", "gather", "slice", "dynamic_slice", "squeeze", "transpose", "select_n"}
    for operation in jaxpr.eqns:
        inner = list(jaxprs_in_params(operation.params))
        for program in inner:
            yield from roundings(program)
        narrow = any(getattr(x.aval, "dtype", None) == jnp.bfloat16 for x in operation.outvars)
        if narrow and not inner and operation.primitive.name not in moved:
            yield operation


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "llama3"])
def test_scaled_rotary_positions_decode(scaling):
    rope = RopeConfig(scaling=scaling, factor=2.0, original_positions=8)
    model = make_model(dataclasses.replace(make_config("llama", {}), rope=rope, positions=16))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (1, 16)))

    @jax.jit
    def run(tokens):
        _, state = model.forward(tokens[:, :12], model.empty_state(1, 16))
        return model.verify(tokens[:, 12:], chain(4), state)[0], model.features(tokens)[:, 12:]

    np.testing.assert_allclose(*run(tokens), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes", "attention", "message"),
    [
        ("llama", {}, {"kind": "longlora"}, "kind=longlora"),
        ("llama", {}, {"kind": "softmax"}, "33 tokens are more than the positions=32"),
        ("llama", {"rope": RopeConfig(scaling="dynamic", factor=2.0)}, {}, "rope.scaling=dynamic"),
        ("gpt2", {}, {}, "33 tokens exceed the model's positions=32"),
        ("flash", {}, {"kind": "quadratic"}, "kind=quadratic"),
        ("flash", {}, {"kind": "softmax"}, "kind=softmax"),
        ("flash", {}, {"causal": False}, "causal=false"),
        ("flash", {"padding": "released"}, {}, "padding=released"),
    ],
)
def test_what_cannot_be_decoded_is_refused(family, changes, attention, message):
    model = create_model(dataclasses.replace(make_config(family, attention), **changes), nnx.Rngs(0))
    with pytest.raises(ConfigError, match=message) as error:
        model.empty_state(1, 33)
    assert "\n" not in str(error.value)


def test_the_state_has_one_size_at_any_length():
    model = make_model(make_config("llama", {}))
    size = lambda state: sum(x.nbytes for x in jax.tree.leaves(state))  # noqa: E731
    assert size(model.empty_state(2, 10)) == size(model.empty_state(2, 1 << 20))
