"""Chunked cross-entropy: the values and gradients of the plain form, without its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lin_jax.tasks.loss import chunked_loss

BATCH, WIDTH, VOCABULARY = 2, 8, 11


def make_inputs(length, seed=0):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(BATCH, length, WIDTH)).astype(np.float32)
    head = 3 * random.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
    targets = random.integers(0, VOCABULARY, (BATCH, length)).astype(np.int32)
    weights = random.choice([0, 0.3, 1, 2], (BATCH, length)).astype(np.float32)
    return hidden, head, targets, weights


def plain(hidden, head, targets, weights, z_loss):
    logits = hidden @ head
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    z = z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum((nll + z) * weights), jnp.sum(nll * weights)


def chunked(hidden, head, targets, weights, chunk, z_loss):
    hidden, targets, weights = map(jnp.asarray, (hidden, targets, weights))
    sums = chunked_loss(lambda part: part @ head, hidden, targets, weights, chunk=chunk, z_loss=z_loss)
    return sums.loss, sums


@pytest.mark.parametrize(
    ("length", "chunk", "z_loss"), [(1, 1, 0.1), (7, 3, 0.0), (12, 4, 0.1), (13, 1, 0.0), (10, 24, 0.1), (11, 10, 0.1)]
)
def test_values_and_gradients_are_those_of_the_plain_form(length, chunk, z_loss):
    inputs = make_inputs(length, seed=length)
    with_gradient = jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True)
    (loss, sums), gradient = jax.jit(with_gradient, static_argnums=(4, 5))(*inputs, chunk, z_loss)
    (expected, nll), slope = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(*inputs, z_loss)
    np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=1e-5)
    np.testing.assert_allclose(sums.nll, nll, rtol=2e-6, atol=1e-5)
    np.testing.assert_allclose(sums.weight, inputs[3].sum(), rtol=1e-6)
    for ours, theirs in zip(gradient, slope, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_tokens_without_weight_do_not_count_whatever_they_are():
    hidden, head, targets, weights = make_inputs(9)
    weights[0, 3:] = 0
    loss, _ = chunked(hidden, head, targets, weights, 4, 0.1)
    hidden[0, 3:], targets[0, 3:] = 100.0, 0
    assert float(loss) == float(chunked(hidden, head, targets, weights, 4, 0.1)[0])


@pytest.mark.parametrize("backward", [False, True])
def test_memory_does_not_grow_with_tokens_times_vocabulary(backward):
    """Temporary memory at T and 4 T: far below one row of logits, which the plain form holds several times."""
    vocabulary, chunk = 8192, 64

    def temporary(function, length):
        if backward:
            function = jax.grad(lambda *a, f=function: f(*a)[0], argnums=(0, 1))
        shapes = [
            jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32),
            jax.ShapeDtypeStruct((WIDTH, vocabulary), jnp.float32),
            jax.ShapeDtypeStruct((1, length), jnp.int32),
            jax.ShapeDtypeStruct((1, length), jnp.float32),
        ]
        return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    small, large = (temporary(lambda *a: chunked(*a, chunk, 0.1), length) for length in (1024, 4096))
    logits = 4096 * vocabulary * 4
    assert temporary(lambda *a: plain(*a, 0.1), 4096) > 0.9 * logits
    assert large < 0.1 * logits and large - small < 4 * 3072 * WIDTH * 8
