"""Every implementation of augmented attention against its definition, and the invariants of the op."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.ops.linear_attention import augmented_attention
from tests.ops.attention_cases import Case, cases, make_case, relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMPLEMENTATIONS = ["xla", "pallas_tpu", "pallas_gpu"]
CAUSAL_ONLY = {"pallas_tpu", "pallas_gpu"}
EVERY = [*IMPLEMENTATIONS, "reference"]
every = st.sampled_from(EVERY)


def assert_states_equal(actual, expected, tolerance=1e-5):
    for name in vars(expected):
        a, b = getattr(actual, name), getattr(expected, name)
        if b is not None:
            assert relative_error(a, b) < tolerance, name


def by_numpy(case: Case) -> np.ndarray:
    """The definition once more, in float64 loops that share nothing with the library; relu2, one sequence a row."""
    a = {k: np.asarray(x, np.float64) for k, x in case.arrays.items()}
    q, k, v, alpha, w = a["q_BTHD"], a["k_BTKD"], a["v_BTKE"], a["alpha"], a["conv_WH"]
    G, R, scale = (case.options[n] for n in ("group_size", "local_groups", "score_scale"))
    B, T, H, _ = q.shape
    y = np.zeros((B, T, H, v.shape[-1]))
    for b, t, h in np.ndindex(B, T, H):
        kv = h // (H // k.shape[2])
        for s in range(t + 1):
            dot = q[b, t, h] @ k[b, s, kv]
            near = t // G - s // G < R
            weight = max(scale * dot, 0) ** 2 if near else alpha[h] * dot
            weight += w[t - s, h] if t - s < len(w) else 0
            y[b, t, h] += weight * v[b, s, kv]
    return y


@pytest.mark.parametrize("local_groups", [1, 2])
@pytest.mark.parametrize("implementation", EVERY)
def test_equals_the_equations_written_in_numpy(implementation, local_groups):
    case = make_case(0, local_groups=local_groups)
    assert relative_error(case(implementation), by_numpy(case)) < 1e-5


@pytest.mark.parametrize(
    ("implementation", "causal"),
    [(name, causal) for name in IMPLEMENTATIONS for causal in (True, False) if causal or name not in CAUSAL_ONLY],
)
@pytest.mark.parametrize("segments", [False, True])
@hypothesis.settings(max_examples=4)
@hypothesis.given(data=st.data())
def test_equals_the_reference_in_values_and_gradients(implementation, causal, segments, data):
    """Invariant 5."""
    case = data.draw(cases(causal=causal, segments=segments, normalise=implementation != "xla" and segments))
    actual, actual_gradient = case.with_gradients(implementation)
    expected, expected_gradient = case.with_gradients("reference")
    assert relative_error(actual, expected) < 1e-5
    for name, gradient in expected_gradient.items():
        assert relative_error(actual_gradient[name], gradient) < 1e-4, name


def test_gradients_equal_finite_differences():
    case = make_case(3, B=1, T=7, K=1, J=2, local="laplace", bias=True, own_grouped=True)
    floats, rng = case.floats(), np.random.default_rng(0)

    @jax.jit
    def loss(floats):
        return jnp.sum(jnp.sin(augmented_attention(**floats, **case.options)))

    with jax.enable_x64(True):
        floats = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), floats)
        gradient = jax.jit(jax.grad(loss))(floats)
        for name, x in floats.items():
            direction = rng.standard_normal(x.shape)
            plus, minus = (loss({**floats, name: x + step * direction}) for step in (1e-2, -1e-2))
            expected = float(jnp.sum(gradient[name] * direction))
            assert abs(float(plus - minus) / 2e-2 - expected) < 1e-2 * max(1.0, abs(expected)), name


@hypothesis.settings(max_examples=6)
@hypothesis.given(implementation=every, case=cases(causal=True), seed=st.integers(0, 1000))
def test_no_token_sees_a_later_one_or_another_segment(implementation, case, seed):
    """Invariant 1: the derivative is exactly 0."""
    T = case.arrays["q_BTHD"].shape[1]
    t = int(np.random.default_rng(seed).integers(T))

    def output(floats):
        y = augmented_attention(**{**case.arrays, **floats}, **case.options, implementation=implementation)
        return jnp.sum(jnp.sin(y[:, t]))

    gradient = jax.jit(jax.grad(output))(case.floats())
    ids = np.asarray(case.arrays.get("segment_ids_BT", np.ones(case.arrays["q_BTHD"].shape[:2])))
    run = np.cumsum(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1)
    unseen = (run != run[:, t : t + 1]) | (np.arange(T) > t) | (ids[:, t : t + 1] == 0)
    for name, x in gradient.items():
        if name.endswith(("THD", "TKD", "TKE", "THP", "TKP")):
            assert np.all(np.asarray(x)[unseen] == 0), name


@hypothesis.settings(max_examples=6)
@hypothesis.given(implementation=every, case=cases(causal=True, segments=False), seed=st.integers(0, 1000))
def test_continuing_from_a_state_is_the_whole_row(implementation, case, seed):
    """Invariant 2: any cut of a row gives the same outputs and the same final state."""
    T = case.arrays["q_BTHD"].shape[1]
    cut = int(np.random.default_rng(seed).integers(0, T + 1))
    expected, expected_state = case("reference", return_state=True)
    first, state = case(implementation, case.tokens(0, cut), return_state=True)
    second, state = case(implementation, {**case.tokens(cut, T), "initial_state": state}, return_state=True)
    assert relative_error(jnp.concatenate([first, second], axis=1), expected) < 1e-5
    assert_states_equal(state, expected_state)


@pytest.mark.parametrize("options", [{"local": "relu2"}, {"local": "softmax", "local_groups": 2, "own_grouped": True}])
def test_step_by_step_is_the_whole_row(options):
    case = make_case(5, T=14, **options)
    expected, expected_state = case("reference", return_state=True)
    _, state = case("xla", case.tokens(0, 0), return_state=True)
    for t in range(14):
        y, state = case("xla", {**case.tokens(t, t + 1), "initial_state": state}, return_state=True)
        assert relative_error(y[:, 0], expected[:, t]) < 1e-5
    assert_states_equal(state, expected_state)


@hypothesis.settings(max_examples=6)
@hypothesis.given(
    implementation=every,
    case=cases(causal=True, segments=False),
    lengths=st.lists(st.integers(0, 9), min_size=3, max_size=3),
)
def test_rows_of_unequal_length_continue_from_their_own_state(implementation, case, lengths):
    """A batch whose rows stop at different places inside a group, padded on the right, goes on exactly."""
    B, T = case.arrays["q_BTHD"].shape[:2]
    ends = np.minimum(np.asarray(lengths[:B]), T)
    ids = jnp.asarray(np.arange(T)[None] < ends[:, None], jnp.int32)
    # Each row's first tokens and then the whole row again, as one sequence.
    index = np.arange(2 * T)[None] - ends[:, None]
    index = jnp.asarray(np.where(index < 0, np.arange(2 * T)[None], np.minimum(index, T - 1)))
    along = lambda x, index: jnp.take_along_axis(x, index[:, :, None, None], axis=1)  # noqa: E731
    joined = {k: along(x, index) if x.ndim == 4 else x for k, x in case.arrays.items()}
    expected = along(case("reference", joined), jnp.asarray(ends[:, None] + np.arange(T)[None]))
    _, state = case(implementation, {**case.arrays, "segment_ids_BT": ids}, return_state=True)
    y = case(implementation, {**case.arrays, "initial_state": state})
    assert relative_error(y, expected) < 1e-5


@hypothesis.settings(max_examples=6)
@hypothesis.given(implementation=every, case=cases(segments=False), before=st.integers(0, 9), after=st.integers(0, 9))
def test_padding_and_packing_change_nothing(implementation, case, before, after):
    """Invariant 4: a sequence with padding or other documents around it gives what it gives alone."""
    hypothesis.assume(case.options["causal"] or implementation not in CAUSAL_ONLY)
    expected = case("reference")
    B, T = case.arrays["q_BTHD"].shape[:2]
    rng = np.random.default_rng(before * 10 + after)
    for left, right in ((0, 0), (7, 8)):
        packed = {}
        for name, x in case.arrays.items():
            if x.ndim == 4:
                around = [jnp.asarray(rng.standard_normal((B, n, *x.shape[2:])), x.dtype) for n in (before, after)]
                packed[name] = jnp.concatenate([around[0], x, around[1]], axis=1)
            else:
                packed[name] = x
        ids = np.concatenate([np.full(before, left), np.ones(T), np.full(after, right)])
        packed["segment_ids_BT"] = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (B, before + T + after))
        y = case(implementation, packed)
        assert relative_error(y[:, before : before + T], expected) < 1e-5
        if left == 0:
            assert np.all(np.asarray(y[:, :before]) == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("local", ["relu2", "laplace", "softmax"])
def test_bfloat16_inputs_are_summed_in_float32(implementation, local, segments):
    case = make_case(2, T=300, group_size=16, D=16, local=local, segments=segments, dtype=jnp.bfloat16)
    wide = {k: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for k, x in case.arrays.items()}
    actual, state = case(implementation, return_state=True)
    assert actual.dtype == jnp.bfloat16
    assert state.state_BKPE.dtype == jnp.float32
    assert relative_error(actual, case("reference", wide)) < 1e-2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_leak_of_rounding_inside_a_group(implementation):
    """The official exclusive sum, `cumsum - own`, leaks 0.03 in bfloat16 (QUIRKS); a shifted sum leaks nothing."""
    case = make_case(2, T=64, group_size=16, local="none", taps=0, dtype=jnp.bfloat16)
    loud = {**case.arrays, "v_BTKE": case.arrays["v_BTKE"].at[:, 31].mul(50)}
    np.testing.assert_array_equal(case(implementation)[:, 16:31], case(implementation, loud)[:, 16:31])


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("local", ["relu2", "laplace", "softmax"])
@pytest.mark.parametrize("segments", [False, True])
def test_zero_vectors_give_no_nan(implementation, local, segments):
    case = make_case(0, local=local, feature_map="unit", local_groups=2, segments=segments)
    zeros = jax.tree.map(jnp.zeros_like, case.floats())

    def loss(floats):
        arrays = {**case.arrays, **floats}
        return jnp.sum(augmented_attention(**arrays, **case.options, implementation=implementation))

    value, gradient = jax.jit(jax.value_and_grad(loss))(zeros)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((value, gradient)))


@pytest.mark.parametrize("segments", [False, True])
def test_every_branch_off_gives_nothing(segments):
    case = make_case(0, local="none", grouped=False, taps=0, segments=segments)
    for implementation in EVERY:
        y = case(implementation)
        assert y.shape == (2, 19, 4, 6)
        assert np.all(np.asarray(y) == 0)


def test_several_chunks_are_one_row():
    """Rows longer than a chunk carry states and tokens across its border."""
    for options in ({}, {"segments": True}, {"local": "softmax", "local_groups": 2}):
        case = make_case(4, B=1, T=1200, K=1, J=1, group_size=64, taps=32, **options)
        assert relative_error(case("xla"), case("reference")) < 1e-5


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("local", ["relu2", "softmax"])
def test_normalising_inside_is_normalising_before(implementation, local):
    """Softmax scores queries and keys as they are; the grouped branch then has its own."""
    case = make_case(1, local=local, feature_map="relu", normalise=True)
    before = dict(case.arrays)
    names = ("q_BTHD", "k_BTKD") if local == "relu2" else ("grouped_q_BTHP", "grouped_k_BTKP")
    for name, of in zip(names, ("q_BTHD", "k_BTKD"), strict=True):
        before[name] = case.arrays[of] / jnp.linalg.norm(case.arrays[of], axis=-1, keepdims=True)
    expected = make_case(1, local=local, feature_map="relu")("reference", before)
    assert relative_error(case(implementation), expected) < 1e-5


def test_memory_is_linear_in_tokens():
    def temporary_bytes(T):
        case = make_case(0, B=1, T=T, group_size=64, taps=32)

        def loss(floats):
            return jnp.sum(augmented_attention(**floats, **case.options))

        compiled = jax.jit(jax.grad(loss)).lower(case.floats()).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16384) < 2.2 * temporary_bytes(8192)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "group_size=0"),
        ({"local": "cosine"}, "local must be one of"),
        ({"feature_map": "cosine"}, "feature_map must be one of"),
        ({"implementation": "cuda"}, "implementation must be one of"),
        ({"bias_XH": jnp.zeros((3, 1))}, "bias_XH needs 4 rows"),
        ({"grouped_q_BTHP": jnp.zeros((2, 19, 4, 5))}, "given together"),
        ({"k_BTKD": jnp.zeros((2, 19, 3, 8)), "v_BTKE": jnp.zeros((2, 19, 3, 6))}, "not divisible"),
        ({"causal": False, "return_state": True}, "bidirectional"),
        ({"normalise": True, "return_state": True}, "normalise=True has no state"),
        ({"causal": False, "implementation": "pallas_tpu"}, "pallas_tpu cannot run: it is causal only"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    case = make_case(0)
    with pytest.raises(ValueError, match=message):
        augmented_attention(**{**case.arrays, **case.options, **change})


def test_refuses_the_state_of_other_inputs():
    _, state = make_case(0)("xla", return_state=True)
    other = make_case(0, group_size=8)
    with pytest.raises(ValueError, match=r"initial_state\.key_BSKD has shape"):
        other("xla", {**other.arrays, "initial_state": state})
