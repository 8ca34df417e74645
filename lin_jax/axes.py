"""The axis legend: one letter, one meaning, in names, einsums, annotations and docstrings.

A tensor inside `lin_jax` carries its axes at the end of its name: `q_BTHD` is batch, tokens, heads, head size.
Public functions are annotated with jaxtyping, whose checker runs in the tests.
"""

AXES = {
    "B": "batch",
    "T": "tokens",
    "H": "query heads",
    "K": "key/value heads (H is a multiple of K)",
    "J": "query heads that share a key/value head, H / K",
    "D": "query/key head size of the local branch",
    "P": "query/key size of the grouped branch: D unless the branch has its own queries or a feature map that widens",
    "E": "value head size",
    "N": "groups",
    "G": "tokens in a group",
    "R": "groups in the local window",
    "S": "slots in the local window, R * G",
    "W": "taps of the causal convolution",
    "X": "distances of the relative bias: S when causal, 2 * S - 1 when bidirectional",
    "M": "tree nodes",
    "Q": "nodes on a path of a tree, the root first",
    "L": "layers",
    "V": "vocabulary",
    "C": "model width",
    "F": "feed-forward width",
}
