"""The matrix product of all attention: in the type of its inputs, summed in float32."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lin_jax.ops.target import target

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def factors(*arrays: Array) -> tuple[Array, ...]:
    """Return the arrays in the type in which the target multiplies them: float32 on a CPU, else their own.

    XLA on CPUs has no product of bfloat16 that is summed in float32 for every layout: jax 0.10.2 fails at run time for
    "bmkjp,bkpe->bkjme" with several rows or nodes (`DotThunk::Execute: BF16 x BF16 = F32`). Where it has one it
    mostly widens the arrays itself. In float32 the products of numbers of 16 bits are the same.
    """
    if target().platform != "cpu":
        return arrays
    return tuple(x.astype(jnp.float32) for x in arrays)


def product(equation: str, a: Array, b: Array) -> Array:
    """Return `jnp.einsum` of two arrays, with sums and result in float32."""
    return jnp.einsum(equation, *factors(a, b), preferred_element_type=jnp.float32)


def in_full_float32(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return the function with all products of float32 arrays multiplied in float32.

    JAX's default rounds what is multiplied, to the 10 bits of TF32 on a GPU and to bfloat16 on a TPU: on an H100, 3 of
    80 greedy texts of a model in float32 changed with the draft or the batch. Arrays of 16 bits are multiplied as ever.
    A CPU multiplies float32 in full by itself, and is not asked.
    """

    @functools.wraps(function)
    def run(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        if target().platform == "cpu":
            return function(*arguments, **named)
        with jax.default_matmul_precision("highest"):
            return function(*arguments, **named)

    return run
