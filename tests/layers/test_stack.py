"""Stacked layers run by a scan are the layers one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.layers.linear import Linear
from lin_jax.layers.parameter import Constant
from lin_jax.layers.stack import run_layers, stack_layers

DEPTH, C = 3, 4


def bend(x):
    """Several steps, each of which has an output to keep for the backward pass."""
    return jnp.tanh(jnp.sin(jnp.tanh(jnp.sin(x))))


class Layer(nnx.Module):
    """A layer with a matrix, a constant and a further argument."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = Linear(C, C, ("width", "width"), rngs=rngs)
        self.offset = Constant(jax.random.normal(rngs.params(), (C,)))

    def __call__(self, x, factor):
        return x + factor * bend(self.linear(x) + self.offset[...][None])


@pytest.fixture
def layers():
    return stack_layers(Layer, DEPTH, nnx.Rngs(0))


def by_loop(layers, x, factor):
    for index in range(DEPTH):
        kernel, bias, offset = layers.linear.kernel[index], layers.linear.bias[index], layers.offset[index]
        x = x + factor * bend(x @ kernel + bias[None] + offset[None])
    return x


def test_every_layer_has_random_numbers_of_its_own(layers):
    assert layers.linear.kernel.shape == (DEPTH, C, C)
    for array in (layers.linear.kernel[...], layers.linear.bias[...], layers.offset[...]):
        assert np.all(np.ptp(np.asarray(array), axis=0) > 0)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_values_and_gradients_equal_a_loop(layers, remat):
    x, factor = jnp.ones((2, C)), jnp.asarray(0.5)
    graph, parameters, rest = nnx.split(layers, nnx.Param, ...)

    def value_and_gradient(run):
        def total(parameters, x):
            return jnp.sum(jnp.sin(run(nnx.merge(graph, parameters, rest), x)))

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(parameters, x)

    actual = value_and_gradient(lambda layers, x: run_layers(layers, x, factor, remat=remat))
    expected = value_and_gradient(lambda layers, x: by_loop(layers, x, factor))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


def test_remat_saves_less(layers):
    graph, arrays = nnx.split(layers)

    def saved_numbers(remat):
        def run(arrays, x):
            return run_layers(nnx.merge(graph, arrays), x, jnp.asarray(0.5), remat=remat)

        _, pullback = jax.vjp(run, arrays, jnp.ones((64, C)))
        return sum(x.size for x in jax.tree.leaves(pullback))

    assert saved_numbers("full") < saved_numbers("dots") < saved_numbers("none")
