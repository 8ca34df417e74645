"""The matrix product of all attention: in the type of its inputs, summed in float32."""

import jax.numpy as jnp
from jaxtyping import Array


def product(equation: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of two arrays, with sums and result in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
