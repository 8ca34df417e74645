"""Augmented linear attention: `api.py` is the public function, `reference.py` the definition, `xla.py` fast.

`pallas_tpu.py` is a kernel, made of the blocks in `chunk.py`; `select.py` chooses.
`verify.py` is the form for decoding: a tree of draft tokens, given a state.
"""

from lin_jax.ops.linear_attention.api import augmented_attention as augmented_attention
from lin_jax.ops.linear_attention.api import explain as explain
