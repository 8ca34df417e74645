"""The matrix product of all attention: in the type of its inputs, summed in float32."""

import jax.numpy as jnp
from jaxtyping import Array

from lin_jax.ops.target import target


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
