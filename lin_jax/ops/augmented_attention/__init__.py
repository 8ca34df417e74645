"""Augmented linear attention: `api.py` is the public function, `reference.py` the definition, `xla.py` fast.

`verify.py` is the form for decoding: a tree of draft tokens, given a state.
"""

from lin_jax.ops.augmented_attention.api import augmented_attention as augmented_attention
