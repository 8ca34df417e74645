"""Agreement with numbers of the official code, case by case; an id begins with the name of the case's file."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lin_jax.convert.flash import config_from_official, from_official, to_official
from lin_jax.convert.names import parameters
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
    ours = to_official(model_of_gradient, official["kernel"], parameters(model_of_gradient))
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


CHECKS = {"flash": check_flash}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_golden(case: Golden) -> None:
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
