"""What an implementation of augmented attention is given: checked, and with every default filled in."""

import dataclasses

from jaxtyping import Array, Float, Int

from lin_jax.ops.state import AttentionState


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of `augmented_attention` after checking.

    Attributes:
        aligned: whether every row is one sequence and starts with a group, so that groups lie alike in all rows: no
            segment ids were given (`segment_ids_BT` then holds ones), and no initial state, or one that ends with a
            group.
        fresh: whether no initial state was given; `initial_state` then holds the empty one.
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
    alpha_H: Float[Array, " H"]
    conv_WH: Float[Array, "W H"] | None
    causal: bool
    group_size: int
    local_groups: int
    segment_ids_BT: Int[Array, "B T"]
    initial_state: AttentionState
    aligned: bool
    fresh: bool
