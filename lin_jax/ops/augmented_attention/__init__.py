"""Augmented linear attention: `api.py` is the public function, `reference.py` the definition, the rest are its forms."""

from lin_jax.ops.augmented_attention.api import augmented_attention as augmented_attention
