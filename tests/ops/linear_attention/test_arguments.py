"""New feature maps and activations by a line in a table: what computes them, and what refuses them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.ops import activations
from lin_jax.ops.linear_attention import AttentionArrays, AttentionOptions, attend, feature_maps
from lin_jax.ops.linear_attention.feature_maps import FEATURE_MAPS, FeatureMap, MapArray, MapArrays
from lin_jax.ops.linear_attention.state import empty_state, pending_tokens
from lin_jax.ops.linear_attention.verify import commit_path, verify_tree
from lin_jax.ops.tree import chain
from tests.ops.attention_cases import make_case, relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

KERNELS = ["pallas_tpu", "pallas_gpu"]


@pytest.fixture
def softplus(monkeypatch):
    """A map that no kernel knows, though it has a gradient."""
    record = FeatureMap("softplus", jax.nn.softplus, True, lambda x, gradient: gradient * jax.nn.sigmoid(x))
    monkeypatch.setitem(feature_maps.FEATURE_MAPS, "softplus", record)
    return "softplus"


@pytest.fixture
def sigmoid(monkeypatch):
    """An activation that no kernel knows."""

    def weights(score, mask):
        return jnp.where(mask, jax.nn.sigmoid(score), 0)

    monkeypatch.setitem(activations.ACTIVATIONS, "sigmoid", activations.Activation("sigmoid", weights))
    return "sigmoid"


def assert_xla_is_the_reference(case):
    """Values, final state, and all gradients."""
    (y, state), (expected, expected_state) = (case(name, return_state=True) for name in ("xla", "reference"))
    assert relative_error(y, expected) < 1e-5
    for name, x in vars(expected_state).items():
        assert x is None or relative_error(getattr(state, name), x) < 1e-5, name
    (_, gradient), (_, expected_gradient) = (case.with_gradients(name) for name in ("xla", "reference"))
    for name, x in expected_gradient.items():
        assert relative_error(gradient[name], x) < 1e-4, name


@pytest.mark.parametrize("own", [False, True])
def test_a_new_map_is_computed_by_xla_and_refused_by_kernels(softplus, own):
    case = make_case(0, feature_map=softplus, own_grouped=own, segments=own)
    assert_xla_is_the_reference(case)
    for kernel in KERNELS:
        with pytest.raises(ValueError, match=f"{kernel} cannot run: it does not know feature_map=softplus"):
            case(kernel)
    plain = make_case(0, feature_map="identity", own_grouped=own, segments=own)
    assert relative_error(case("xla"), plain("xla")) > 1e-2


def test_a_new_activation_is_computed_by_xla_and_refused_by_kernels(sigmoid):
    case = make_case(1, local=sigmoid, segments=True)
    assert_xla_is_the_reference(case)
    for kernel in KERNELS:
        with pytest.raises(ValueError, match=f"{kernel} cannot run: it does not know local=sigmoid"):
            case(kernel)
    assert relative_error(case("xla"), make_case(1, local="relu2", segments=True)("xla")) > 1e-2


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_say_nothing_of_a_map_that_is_off(softplus, kernel):
    case = make_case(2, feature_map=softplus, grouped=False)
    assert relative_error(case(kernel), case("reference")) < 1e-5


@pytest.mark.parametrize("field", ["local", "feature_map", "implementation"])
def test_unknown_names_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be one of .*, but is 'cube'"):
        AttentionOptions(group_size=4, **{field: "cube"})


def scaled(x, weight_PD):
    return jnp.einsum("...d,pd->...p", x, weight_PD)


@pytest.fixture
def learned(monkeypatch):
    """A map with a parameter, other ones for queries and for keys, that widens."""

    def shape(head_size, feature_size):
        return feature_size, head_size

    def draw(key, head_size, feature_size):
        return jax.random.normal(key, shape(head_size, feature_size))

    record = FeatureMap(
        "learned", scaled, False, arrays=(MapArray("weight", True, shape, draw),), size=lambda head, features: features
    )
    monkeypatch.setitem(FEATURE_MAPS, "learned", record)
    return record


@pytest.mark.parametrize("name", ["favor", "fourier", "learned"])
@pytest.mark.parametrize("implementation", ["xla", "reference", *KERNELS])
def test_maps_with_arrays_are_applied_before_any_form(learned, name, implementation):
    """As if the features were given as the grouped branch's own queries and keys; with gradients of the arrays."""
    case, record = make_case(3, T=13), FEATURE_MAPS[name]
    drawn = [array.draw(jax.random.key(n), 8, 6) for n in (0, 1) for array in record.arrays]
    arrays = {"alpha_H" if key == "alpha" else key: x for key, x in case.arrays.items()}
    options = AttentionOptions(**{**case.options, "feature_map": name, "implementation": implementation})

    @jax.jit
    def by_name(drawn):
        features = MapArrays((drawn[0],), (drawn[1],))
        return attend(AttentionArrays(**arrays, features=features), options)[0]

    @jax.jit
    def by_hand(drawn):
        own = record.apply(arrays["q_BTHD"], drawn[0]), record.apply(arrays["k_BTKD"], drawn[1])
        given = AttentionArrays(**arrays, grouped_q_BTHP=own[0], grouped_k_BTKP=own[1])
        return attend(given, dataclasses.replace(options, feature_map="identity", implementation="reference"))[0]

    assert relative_error(by_name(drawn), by_hand(drawn)) < 1e-5
    gradients = (jax.grad(lambda drawn, f=f: jnp.sum(jnp.sin(f(drawn))))(drawn) for f in (by_name, by_hand))
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a, b) < 1e-4


def test_arrays_of_a_map_must_be_given():
    x = jnp.zeros((1, 4, 1, 2))
    options = AttentionOptions(group_size=2, feature_map="favor")
    with pytest.raises(ValueError, match="feature_map=favor needs features: projection"):
        attend(AttentionArrays(x, x, x), options)
    with pytest.raises(ValueError, match="feature_map=favor needs 1 arrays for queries and for keys"):
        attend(AttentionArrays(x, x, x, features=MapArrays((), ())), options)


def test_steps_with_a_map_that_has_arrays_are_the_forward_pass():
    """States hold its features."""
    case, T = make_case(4, T=11, group_size=3), 11
    projection = (FEATURE_MAPS["favor"].arrays[0].draw(jax.random.key(0), 8, 6),)
    options = AttentionOptions(**{**case.options, "feature_map": "favor"})
    named = {"alpha_H" if key == "alpha" else key: x for key, x in case.arrays.items()}

    def arrays(start, stop):
        cut = {name: x[:, start:stop] if x.ndim == 4 else x for name, x in named.items()}
        return AttentionArrays(**cut, features=MapArrays(projection, projection))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def step(state, start, stop):
        nodes, count = arrays(start, stop), stop - start
        y = verify_tree(nodes, chain(count), state, options)
        path_BQ = jnp.broadcast_to(jnp.arange(count), (2, count))
        return y, commit_path(state, pending_tokens(nodes, options), path_BQ, jnp.full(2, count), options)

    whole = arrays(0, T)
    pending = pending_tokens(whole, options)
    state, parts = empty_state(whole.k_BTKD, whole.v_BTKE, options, grouped_k_BTKP=pending.grouped_key_BMKP, taps=5), []
    for start in range(0, T, 4):
        y, state = step(state, start, min(start + 4, T))
        parts.append(y)
    expected = attend(whole, dataclasses.replace(options, implementation="reference"))[0]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-4)
