"""What an implementation of augmented attention is given: checked, and with every default filled in."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.ops.linear_attention.arguments import (
    AttentionArrays,
    AttentionOptions,
    per_head,
    refuse_states,
    with_features,
    with_unit_vectors,
)
from lin_jax.ops.linear_attention.state import AttentionState, empty_state


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A call of the op on whole rows, after checking.

    Attributes:
        arrays: with the features of a map that has arrays; bias and filter float32, one a query head.
        alpha_H: float32.
        options: as given; identity instead of a feature map that has arrays.
        segment_ids_BT: ones where none were given.
        initial_state: the empty one where none was given.
        aligned: whether every row is one sequence and starts with a group, so that groups lie alike in all rows: no
            segment ids were given, and no initial state, or one that ends with a group.
        fresh: whether no initial state was given.
        return_state: whether the final state is asked for.
    """

    arrays: AttentionArrays
    alpha_H: Float[Array, " H"]
    options: AttentionOptions
    segment_ids_BT: Int[Array, "B T"]
    initial_state: AttentionState
    aligned: bool
    fresh: bool
    return_state: bool

    @property
    def own_grouped(self) -> bool:
        """Return whether the grouped branch is on and has its own queries and keys."""
        return self.options.grouped and self.arrays.grouped_q_BTHP is not None


def make_inputs(
    arrays: AttentionArrays,
    options: AttentionOptions,
    *,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    initial_state: AttentionState | None = None,
    aligned_state: bool = False,
    return_state: bool = False,
) -> Inputs:
    """Return the arguments of `attend`, checked and with defaults filled in.

    Raises:
        ValueError: what does not fit together.
    """
    if initial_state is not None or return_state:
        refuse_states(options)
    _check_shapes(arrays)
    _check_bias(arrays.bias_XH, options)
    arrays, options = with_features(arrays, options)
    (B, T, H, _), bias, conv = arrays.q_BTHD.shape, arrays.bias_XH, arrays.conv_WH
    arrays = dataclasses.replace(
        arrays,
        bias_XH=None if bias is None else _each_head(bias, H),
        conv_WH=None if conv is None or not arrays.taps else _each_head(conv, H),
    )
    empty = empty_state(arrays.k_BTKD, arrays.v_BTKE, options, grouped_k_BTKP=arrays.grouped_k_BTKP, taps=arrays.taps)
    if initial_state is not None:
        _check_state(initial_state, empty)
    return Inputs(
        arrays=arrays,
        alpha_H=per_head(arrays.alpha_H, H),
        options=options,
        segment_ids_BT=jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT,
        initial_state=empty if initial_state is None else initial_state,
        aligned=segment_ids_BT is None and (initial_state is None or aligned_state),
        fresh=initial_state is None,
        return_state=return_state,
    )


def normalised(inputs: Inputs) -> Inputs:
    """Return the same with queries and keys that are normalised already, where the options ask for it."""
    if not inputs.options.normalise:
        return inputs
    arrays, state = with_unit_vectors(inputs.arrays, inputs.options), inputs.initial_state
    if arrays.grouped_k_BTKP is not None and state.grouped_key_BSKP is None:
        B, _, K, P = arrays.grouped_k_BTKP.shape
        slots = jnp.zeros((B, inputs.options.slots, K, P), arrays.grouped_k_BTKP.dtype)
        state = dataclasses.replace(state, grouped_key_BSKP=slots)
    options = dataclasses.replace(inputs.options, normalise=False)
    return dataclasses.replace(inputs, arrays=arrays, options=options, initial_state=state)


def _each_head(table: Float[Array, "any #H"], heads: int) -> Float[Array, "any H"]:
    return jnp.broadcast_to(table.astype(jnp.float32), (table.shape[0], heads))


def _check_shapes(arrays: AttentionArrays) -> None:
    q, k, v = arrays.q_BTHD, arrays.k_BTKD, arrays.v_BTKE
    grouped_q, grouped_k = arrays.grouped_q_BTHP, arrays.grouped_k_BTKP
    H, K = q.shape[2], k.shape[2]
    if K == 0 or H % K:
        raise ValueError(f"{H} query heads are not divisible by {K} key/value heads")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if grouped_q is None and grouped_k is None:
        return
    if grouped_q is None or grouped_k is None:
        raise ValueError("grouped_q_BTHP and grouped_k_BTKP must be given together")
    if grouped_q.shape[:3] != q.shape[:3] or grouped_k.shape[:3] != k.shape[:3]:
        raise ValueError(f"shapes do not fit: grouped q {grouped_q.shape}, k {grouped_k.shape}, local q {q.shape}")


def _check_bias(bias_XH: Array | None, options: AttentionOptions) -> None:
    needed = options.slots if options.causal else 2 * options.slots - 1
    if bias_XH is not None and bias_XH.shape[0] != needed:
        raise ValueError(f"bias_XH needs {needed} rows, one a distance in the local window, but has {bias_XH.shape[0]}")


def _check_state(state: AttentionState, empty: AttentionState) -> None:
    for name, expected in vars(empty).items():
        found = getattr(state, name)
        shape = None if found is None else found.shape
        if name == "tail_BUKE" and found.shape[1] > expected.shape[1]:
            continue  # it serves a longer filter, and holds all that this one needs
        if shape != (None if expected is None else expected.shape):
            raise ValueError(
                f"initial_state.{name} has shape {shape}, but these inputs need "
                f"{None if expected is None else expected.shape}"
            )
