"""What an implementation of augmented attention is given: checked, and with every default filled in."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.ops.feature_maps import unit
from lin_jax.ops.state import AttentionState


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


class Scored(NamedTuple):
    """What queries and keys are multiplied in each branch; None: the grouped branch takes those of the local one."""

    query: Array
    key: Array
    grouped_query: Array | None
    grouped_key: Array | None


def normalise_scored(given: Scored, local: str, grouped: bool) -> Scored:
    """Queries and keys divided by their norms as `augmented_attention` says of `normalise`."""
    local_pair = (given.query, given.key) if local == "softmax" else (unit(given.query), unit(given.key))
    if not grouped or (given.grouped_query is None and local != "softmax"):
        return Scored(*local_pair, given.grouped_query, given.grouped_key)
    query = given.query if given.grouped_query is None else given.grouped_query
    key = given.key if given.grouped_key is None else given.grouped_key
    return Scored(*local_pair, unit(query), unit(key))


def normalised(inputs: Inputs) -> Inputs:
    """The same with queries and keys that are normalised already, where `inputs.normalise` asks for it."""
    if not inputs.normalise:
        return inputs
    given = Scored(inputs.q_BTHD, inputs.k_BTKD, inputs.grouped_q_BTHP, inputs.grouped_k_BTKP)
    made = normalise_scored(given, inputs.local, inputs.grouped)
    state = inputs.initial_state
    if made.grouped_key is not None:
        slots = jnp.zeros((len(made.grouped_key), inputs.slots, *made.grouped_key.shape[2:]), made.grouped_key.dtype)
        state = dataclasses.replace(state, grouped_key_BSKP=slots)
    return dataclasses.replace(
        inputs,
        normalise=False,
        q_BTHD=made.query,
        k_BTKD=made.key,
        grouped_q_BTHP=made.grouped_query,
        grouped_k_BTKP=made.grouped_key,
        initial_state=state,
    )
