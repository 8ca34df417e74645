"""What an implementation of augmented attention is given: checked, and with every default filled in."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.ops.linear_attention.feature_maps import unit
from lin_jax.ops.linear_attention.state import AttentionState


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of `augmented_attention` after checking.

    Attributes:
        aligned: whether every row is one sequence and starts with a group, so that groups lie alike in all rows: no
            segment ids were given (`segment_ids_BT` then holds ones), and no initial state, or one that ends with a
            group.
        fresh: whether no initial state was given; `initial_state` then holds the empty one.
        return_state: whether the final state is asked for.
        alpha_H: float32 weight of the grouped branch a query head.
        bias_XH, conv_WH: float32, broadcast to all query heads.
    """

    q_BTHD: Float[Array, "B T H D"]
    k_BTKD: Float[Array, "B T K D"]
    v_BTKE: Float[Array, "B T K E"]
    grouped_q_BTHP: Float[Array, "B T H P"] | None
    grouped_k_BTKP: Float[Array, "B T K P"] | None
    local: str
    score_scale: float
    bias_XH: Float[Array, "X H"] | None
    grouped: bool
    feature_map: str
    normalise: bool
    alpha_H: Float[Array, " H"]
    conv_WH: Float[Array, "W H"] | None
    causal: bool
    group_size: int
    local_groups: int
    segment_ids_BT: Int[Array, "B T"]
    initial_state: AttentionState
    aligned: bool
    fresh: bool
    return_state: bool

    @property
    def slots(self) -> int:
        """Slots S in the local window."""
        return self.group_size * self.local_groups


def normalised(inputs: Inputs) -> Inputs:
    """The same with queries and keys that are normalised already, where `inputs.normalise` asks for it."""
    if not inputs.normalise:
        return inputs
    q, k = inputs.q_BTHD, inputs.k_BTKD
    changes: dict[str, Any] = {}
    if inputs.local != "softmax":
        changes = {"q_BTHD": unit(q), "k_BTKD": unit(k)}
    if inputs.grouped and (inputs.grouped_q_BTHP is not None or inputs.local == "softmax"):
        grouped_q = q if inputs.grouped_q_BTHP is None else inputs.grouped_q_BTHP
        grouped_k = k if inputs.grouped_k_BTKP is None else inputs.grouped_k_BTKP
        slots = jnp.zeros((grouped_k.shape[0], inputs.slots, *grouped_k.shape[2:]), grouped_k.dtype)
        state = dataclasses.replace(inputs.initial_state, grouped_key_BSKP=slots)
        changes |= {"grouped_q_BTHP": unit(grouped_q), "grouped_k_BTKP": unit(grouped_k), "initial_state": state}
    return dataclasses.replace(inputs, normalise=False, **changes)
