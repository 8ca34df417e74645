"""Random queries, keys and values."""

import jax


def random_heads(length, key_value_heads=2):
    keys = jax.random.split(jax.random.key(3), 3)
    heads = (4, key_value_heads, key_value_heads)
    return [jax.random.normal(key, (1, length, h, 8)) for key, h in zip(keys, heads, strict=True)]
