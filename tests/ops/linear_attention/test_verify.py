"""Trees, steps and commits of augmented attention against the definition, at and across the ends of groups."""

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.ops.linear_attention import AttentionArrays, AttentionOptions, augmented_attention
from lin_jax.ops.linear_attention.state import empty_state, pending_tokens
from lin_jax.ops.linear_attention.verify import commit_path, verify_tree
from lin_jax.ops.tree import Tree, chain
from tests.ops.decode_cases import Draft, make_draft, random_tree, tree_shapes

pytestmark = pytest.mark.usefixtures("quick_compilation")

TYPES = [jnp.float32, jnp.bfloat16]
NAMES = {"q": "q_BTHD", "k": "k_BTKD", "v": "v_BTKE", "grouped_q": "grouped_q_BTHP", "grouped_k": "grouped_k_BTKP"}


@dataclasses.dataclass(frozen=True)
class Op:
    """The op with its weights and options, in all of its forms."""

    weights: dict[str, Any]
    options: dict[str, Any]

    @property
    def record(self):
        return AttentionOptions(**self.options)

    def forward(self, arrays, ids_BT=None, state=None, implementation="xla"):
        named = {NAMES[name]: x for name, x in arrays.items()}
        more = {"segment_ids_BT": ids_BT, "initial_state": state, "implementation": implementation}
        return augmented_attention(**named, **self.weights, **self.options, **more, return_state=True)

    def truth(self, arrays, ids_BT):
        """The definition's outputs for the very numbers of `arrays`, in float32."""
        arrays = {name: x.astype(jnp.float32) for name, x in arrays.items()}
        call = lambda arrays, ids: self.forward(arrays, ids, implementation="reference")[0]  # noqa: E731
        return jax.jit(call)(arrays, ids_BT)

    def verify(self, nodes, tree: Tree, state):
        return verify_tree(self.nodes(nodes), tree, state, self.record)

    def nodes(self, nodes):
        weights = {"alpha_H" if name == "alpha" else name: x for name, x in self.weights.items()}
        return AttentionArrays(**{NAMES[name]: x for name, x in nodes.items()}, **weights)

    def pending(self, nodes):
        return pending_tokens(self.nodes(nodes), self.record)

    def empty(self, arrays):
        own = arrays.get("grouped_k")
        taps = self.weights["conv_WH"].shape[0] if "conv_WH" in self.weights else 0
        return empty_state(arrays["k"], arrays["v"], self.record, grouped_k_BTKP=own, taps=taps)


def options(largest_group: int = 64) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of `make_op`, over the space of the op's options."""
    return st.fixed_dictionaries(
        dict(
            seed=st.integers(0, 2**16),
            K=st.integers(1, 2),
            J=st.integers(1, 2),
            W=st.sampled_from([0, 1, 2, 5, 13, 32]),
            shared_filter=st.booleans(),
            bias=st.booleans(),
            own_grouped=st.booleans(),
            local=st.sampled_from(["relu2", "laplace", "softmax", "none"]),
            grouped=st.booleans(),
            feature_map=st.sampled_from(["identity", "unit", "relu", "elu1"]),
            group_size=st.sampled_from([size for size in (1, 2, 3, 4, 5, 7, 8, 16, 32, 64) if size <= largest_group]),
            local_groups=st.integers(1, 3),
        )
    )


def make_op(*, seed, K, J, W, shared_filter, bias, own_grouped, **options) -> tuple[Op, dict[str, tuple[int, int]]]:
    """The op, and the heads and sizes of its arrays."""
    D, E, H, rng = 4, 3, K * J, np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    weights = {"alpha": 0.1 * normal(H)}
    if W:
        weights["conv_WH"] = normal(W, 1 if shared_filter else H)
    if bias:
        weights["bias_XH"] = normal(options["group_size"] * options["local_groups"], 1 if shared_filter else H)
    sizes = {"q": (H, D), "k": (K, D), "v": (K, E)}
    own = {"grouped_q": (H, 5), "grouped_k": (K, 5)} if own_grouped else {}
    return Op(weights, {"score_scale": D**-0.5, **options}), sizes | own


def close(actual, expected):
    """Equality to rounding: of sums in float32; of weights, states and outputs in types of 16 bits."""
    actual = jnp.asarray(actual)
    tolerance = max(1e-4, 4 * float(jnp.finfo(actual.dtype).eps))
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, rtol=0, atol=tolerance * scale)


def positions(G: int) -> st.SearchStrategy[int]:
    """Lengths 0 to 4 G, often at the end of a group."""
    border = st.tuples(st.integers(0, 4), st.integers(-2, 1)).map(lambda p: min(max(p[0] * G + p[1], 0), 4 * G))
    return border | st.integers(0, 4 * G)


@pytest.mark.parametrize("dtype", TYPES)
@hypothesis.settings(max_examples=5)
@hypothesis.given(data=st.data(), chosen=options(), shape=tree_shapes)
def test_a_tree_and_what_follows_its_commit(dtype, data, chosen, shape):
    """A tree is verified, a path of each row committed, and the tree verified again behind it."""
    (op, sizes), tree = make_op(**chosen), random_tree(*shape)
    G, B = op.options["group_size"], data.draw(st.integers(1, 3))
    length_B = np.array([data.draw(positions(G)) for _ in range(B)])
    draft = make_draft(data.draw(st.integers(0, 99)), tree, 4 * G, B=B, sizes=sizes, dtype=dtype)
    chosen_B = np.array([data.draw(st.integers(0, tree.nodes - 1)) for _ in range(B)])
    count_B = np.array([data.draw(st.integers(0, tree.depth_M[node] + 1)) for node in chosen_B])
    path_BQ = tree.path_MQ[chosen_B]

    @jax.jit
    def run(draft_row, nodes, length_B, path_BQ, count_B):
        real_BT = jnp.arange(4 * G)[None] < length_B[:, None]
        _, state = op.forward(draft_row, real_BT.astype(jnp.int32))
        y = op.verify(nodes, tree, state)
        after = commit_path(state, op.pending(nodes), path_BQ, count_B, op.record)
        return y, op.verify(nodes, tree, after), after.length_B

    first, second, length = run(draft.row, draft.nodes, length_B, path_BQ, count_B)
    np.testing.assert_array_equal(length, length_B + count_B)
    close(first, draft.at_nodes(op.truth(*draft.sequences(length_B)), length_B))
    longer = behind(draft, length_B, path_BQ, count_B)
    close(second, longer.at_nodes(op.truth(*longer.sequences(length_B + count_B)), length_B + count_B))


def behind(draft: Draft, length_B, path_BQ, count_B) -> Draft:
    """The draft whose rows have their committed paths appended."""
    T, P = next(iter(draft.row.values())).shape[1], path_BQ.shape[1]
    index = np.tile(np.arange(T + P) % T, (len(length_B), 1))
    for b, (length, count) in enumerate(zip(length_B, count_B, strict=True)):
        index[b, length : length + count] = T + path_BQ[b, :count]
    joined = {name: jnp.concatenate([x, draft.nodes[name]], axis=1) for name, x in draft.row.items()}
    row = {name: x[np.arange(len(length_B))[:, None], index] for name, x in joined.items()}
    return Draft(row, draft.nodes, draft.tree)


@pytest.mark.parametrize("dtype", TYPES)
@hypothesis.settings(max_examples=3)
@hypothesis.given(data=st.data(), chosen=options(largest_group=8))
def test_steps_and_chunks_are_the_forward_pass(dtype, data, chosen):
    """Token by token, chunk by chunk, and committed chains of a few tokens give the outputs of the whole row."""
    op, sizes = make_op(**chosen)
    T = data.draw(st.integers(1, 20))
    draft = make_draft(data.draw(st.integers(0, 99)), chain(1), T, B=2, sizes=sizes, dtype=dtype)
    expected = op.truth(draft.row, jnp.ones((2, T), jnp.int32))

    @functools.partial(jax.jit, static_argnames="length")
    def verified(tokens, state, length):
        y = op.verify(tokens, chain(length), state)
        path_BQ = jnp.broadcast_to(jnp.arange(length)[None], (2, length))
        return y, commit_path(state, op.pending(tokens), path_BQ, jnp.full(2, length), op.record)

    @functools.partial(jax.jit, static_argnames="length")
    def chunk(tokens, state, length):
        return op.forward(tokens, state=state)

    width = data.draw(st.integers(2, 7))
    for step, form in ((1, verified), (width, verified), (width, chunk)):
        state, y = op.empty(draft.row), []
        for start in range(0, T, step):
            tokens = {name: x[:, start : start + step] for name, x in draft.row.items()}
            part, state = form(tokens, state, length=min(step, T - start))
            y.append(part)
        close(np.concatenate(y, axis=1), expected)


def test_a_filter_longer_than_the_tail_is_refused():
    x = jnp.zeros((1, 1, 1, 2))
    options = AttentionOptions(group_size=2)
    state = empty_state(x, x, options, taps=2)
    with pytest.raises(ValueError, match="needs a state with a tail of 2 values"):
        verify_tree(AttentionArrays(x, x, x, conv_WH=jnp.zeros((3, 1))), chain(1), state, options)
