"""Random inputs of augmented attention, shared by the tests of every implementation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.ops.linear_attention import AttentionArrays, AttentionOptions, augmented_attention, explain
from lin_jax.ops.linear_attention.select import Choice

TOKEN_INPUTS = ("q_BTHD", "k_BTKD", "v_BTKE", "grouped_q_BTHP", "grouped_k_BTKP", "segment_ids_BT")


def relative_error(actual, expected) -> float:
    """Largest difference over the largest entry."""
    scale = max(1e-6, float(np.abs(expected).max(initial=0)))
    return float(np.abs(np.asarray(actual, np.float32) - np.asarray(expected, np.float32)).max(initial=0)) / scale


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: `arrays` may be traced, `options` are static."""

    arrays: dict[str, Any]
    options: dict[str, Any]

    def __call__(self, implementation: str, arrays: dict[str, Any] | None = None, return_state: bool = False):
        """The op on these arrays, compiled once for arrays of the same shapes."""
        more = {"implementation": implementation, "return_state": return_state}
        return self._compiled(self.arrays if arrays is None else arrays, **more)

    @functools.cached_property
    def _compiled(self) -> Callable:
        def call(arrays, implementation, return_state):
            return augmented_attention(
                **arrays, **self.options, implementation=implementation, return_state=return_state
            )

        return jax.jit(call, static_argnames=("implementation", "return_state"))

    def with_gradients(self, implementation: str) -> tuple[Any, dict[str, Any]]:
        """The outputs, and the gradients of their sum weighted by normal numbers."""

        @jax.jit
        def run(floats, cotangent):
            def call(floats):
                return augmented_attention(**{**self.arrays, **floats}, **self.options, implementation=implementation)

            y, pullback = jax.vjp(call, floats)
            return y, pullback(cotangent)[0]

        shape = (*self.arrays["q_BTHD"].shape[:3], self.arrays["v_BTKE"].shape[-1])
        cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
        return run(self.floats(), cotangent)

    def explained(self, **more: Any) -> Choice:
        """Which implementation runs, and why."""
        arrays = {"alpha_H" if name == "alpha" else name: x for name, x in self.arrays.items()}
        ids = arrays.pop("segment_ids_BT", None)
        return explain(AttentionArrays(**arrays), AttentionOptions(**self.options, **more), segment_ids_BT=ids)

    def tokens(self, start: int, stop: int | None = None) -> dict[str, Any]:
        """The arrays with only tokens `start` to `stop`."""
        return {k: x[:, start:stop] if k in TOKEN_INPUTS else x for k, x in self.arrays.items()}

    def floats(self) -> dict[str, Any]:
        """The arrays that have gradients."""
        return {k: x for k, x in self.arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}


def make_case(
    seed: int,
    *,
    B: int = 2,
    T: int = 19,
    K: int = 2,
    J: int = 2,
    D: int = 8,
    E: int = 6,
    local: str = "relu2",
    group_size: int = 4,
    local_groups: int = 1,
    taps: int = 5,
    shared_filter: bool = False,
    causal: bool = True,
    grouped: bool = True,
    bias: bool = False,
    own_grouped: bool = False,
    feature_map: str = "identity",
    segments: bool = False,
    normalise: bool = False,
    dtype: Any = jnp.float32,
) -> Case:
    """Inputs with normal entries."""
    rng = np.random.default_rng(seed)
    H = K * J

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    arrays = {
        "q_BTHD": normal(B, T, H, D),
        "k_BTKD": normal(B, T, K, D),
        "v_BTKE": normal(B, T, K, E),
        "alpha": normal(H, dtype=jnp.float32),
    }
    if taps:
        arrays["conv_WH"] = normal(taps, 1 if shared_filter else H, dtype=jnp.float32)
    if bias:
        slots = group_size * local_groups
        arrays["bias_XH"] = normal(slots if causal else 2 * slots - 1, 1, dtype=jnp.float32)
    if own_grouped:
        arrays["grouped_q_BTHP"] = normal(B, T, H, 5)
        arrays["grouped_k_BTKP"] = normal(B, T, K, 5)
    if segments:
        arrays["segment_ids_BT"] = jnp.asarray(np.cumsum(rng.random((B, T)) < 0.2, axis=1) % 4, jnp.int32)
    options = {
        "local": local,
        "normalise": normalise,
        "score_scale": D**-0.5,
        "grouped": grouped,
        "feature_map": feature_map,
        "causal": causal,
        "group_size": group_size,
        "local_groups": local_groups,
    }
    return Case(arrays, options)


@st.composite
def cases(draw: st.DrawFn, causal: bool | None = None, segments: bool | None = None, **fixed: Any) -> Case:
    """Cases over the whole space of options, at small sizes."""
    chosen = {
        "seed": draw(st.integers(0, 2**16)),
        "B": draw(st.integers(1, 3)),
        "T": draw(st.integers(1, 30)),
        "K": draw(st.integers(1, 2)),
        "J": draw(st.integers(1, 2)),
        "local": draw(st.sampled_from(["relu2", "laplace", "softmax", "none"])),
        "group_size": draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
        "local_groups": draw(st.integers(1, 3)),
        "taps": draw(st.sampled_from([0, 1, 4, 13, 40])),
        "shared_filter": draw(st.booleans()),
        "grouped": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "own_grouped": draw(st.booleans()),
        "feature_map": draw(st.sampled_from(["identity", "unit", "relu", "elu1"])),
        "causal": draw(st.booleans()) if causal is None else causal,
        "segments": draw(st.booleans()) if segments is None else segments,
    }
    return make_case(**{**chosen, **fixed})
