"""Augmented linear attention: `api.py` is the public function, `reference.py` the definition, `xla.py` fast.

`arguments.py` states the arguments once, for every function. `tpu/` and `gpu/` are kernels, made of the blocks in
`chunk.py`; `select.py` chooses. `verify.py` is the form for decoding: a tree of draft tokens, given a state.
"""

from lin_jax.ops.linear_attention.api import attend as attend
from lin_jax.ops.linear_attention.api import augmented_attention as augmented_attention
from lin_jax.ops.linear_attention.api import explain as explain
from lin_jax.ops.linear_attention.arguments import AttentionArrays as AttentionArrays
from lin_jax.ops.linear_attention.arguments import AttentionOptions as AttentionOptions
