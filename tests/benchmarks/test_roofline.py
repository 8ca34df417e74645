"""The operations that benchmarks.roofline counts by hand, against the programs themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from benchmarks import aot, roofline
from lin_jax.chips import chip_named
from lin_jax.ops.linear_attention import augmented_attention
from tests.ops.attention_cases import make_case


def products(jaxpr) -> int:
    """Operations of all matrix products of a program; of a loop's body once."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted,), _), _ = equation.params["dimension_numbers"]
            total += 2 * equation.outvars[0].aval.size * equation.invars[0].aval.shape[contracted]
        total += sum(map(products, jaxprs_in_params(equation.params)))
    return total


def kernels(jaxpr) -> list:
    """The programs of all kernels that are not simulated, by their order."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found += [] if equation.params["interpret"] else [equation.params["jaxpr"]]
        else:
            found += [kernel for inner in jaxprs_in_params(equation.params) for kernel in kernels(inner)]
    return found


@pytest.mark.parametrize(
    "options",
    [{"local": "relu2"}, {"local": "laplace", "own_grouped": True, "local_groups": 2}, {"local": "softmax", "taps": 0}],
)
def test_products_of_the_gpu_kernels(options):
    """A group is a block, so that the loop over blocks has no loops in it and its body is counted once."""
    case = make_case(0, B=1, T=48, K=1, J=1, D=16, E=16, group_size=16, **options)
    blocks = 3

    def both(floats, y):
        attend = lambda floats: augmented_attention(**floats, **case.options, implementation="pallas_gpu")  # noqa: E731
        return jax.vjp(attend, floats)[1](y)

    jaxpr = jax.make_jaxpr(both)(case.floats(), jnp.zeros((1, 48, 1, 16)))
    forward, queries, keys = (blocks * products(kernel) for kernel in kernels(jaxpr.jaxpr))
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in case.arrays.items()}
    counted = aot.Case(shapes, case.options)
    assert roofline.of_inputs(counted, roofline.gpu_kernel, "cpu", "forward").flops == forward
    plan = roofline.of_inputs(counted, lambda inputs: roofline.gpu_plan.make_plans(inputs, "cpu").backward)
    assert roofline.query_kernels(plan).flops == queries
    assert roofline.key_kernels(plan).flops == keys


def test_products_of_xla_s_form():
    """As its compiler counts them, for one chunk of tokens."""
    case = roofline.in_float32(aot.make(1, 512, 2, 2, 32, 32, taps=8, local="relu2", group_size=64))
    by_hand = roofline.xla_form(roofline.axes_of(case), "forward")
    by_compiler = roofline.compiled_counts(case, "forward")
    np.testing.assert_allclose(by_compiler["flops"], by_hand.flops, rtol=0.1)
    assert by_hand.bytes_accessed < by_compiler["bytes accessed"]


def test_the_best_time_is_the_longer_of_two():
    chip = dataclasses.replace(chip_named("v5e"), flops=100.0, memory_bandwidth=10.0)
    assert roofline.best_time(roofline.Cost(200, 0, 10), chip) == 2
    assert roofline.best_time(roofline.Cost(200, 0, 50), chip) == 5
