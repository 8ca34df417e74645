"""The one public function of augmented linear attention."""

import inspect
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.ops.layout import token_layout
from lin_jax.ops.linear_attention.feature_maps import FEATURE_MAPS
from lin_jax.ops.linear_attention.inputs import Inputs
from lin_jax.ops.linear_attention.select import IMPLEMENTATIONS, Choice, attend, choose
from lin_jax.ops.linear_attention.state import AttentionState, advance, empty_state

Local = Literal["relu2", "laplace", "softmax", "none"]


def augmented_attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKE: Float[Array, "B T K E"],
    *,
    grouped_q_BTHP: Float[Array, "B T H P"] | None = None,
    grouped_k_BTKP: Float[Array, "B T K P"] | None = None,
    local: str = "relu2",
    score_scale: float = 1.0,
    bias_XH: Float[Array, "X #H"] | None = None,
    grouped: bool = True,
    feature_map: str = "identity",
    normalise: bool = False,
    alpha: Float[Array, " #H"] | Float[Array, ""] | float = 1.0,
    conv_WH: Float[Array, "W #H"] | None = None,
    causal: bool = True,
    group_size: int,
    local_groups: int = 1,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    initial_state: AttentionState | None = None,
    aligned_state: bool = False,
    return_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H E"] | tuple[Float[Array, "B T H E"], AttentionState]:
    """Local attention in a window of groups, linear attention to the groups before it, and a convolution of the values.

    With position t in its sequence, group g(t) = floor(t / G) and all sums over tokens s of the same sequence:

        local_t   = sum over s <= t with g(t) - g(s) < R of  a(score(q_t, k_s)) v_s
        grouped_t = phi(q_t) . sum over s with g(t) - g(s) >= R of  phi(k_s) v_s^T
        conv_t    = sum over j = 0..W-1 of  w_j v_{t-j}
        y_t       = local_t + alpha grouped_t + conv_t

    with score(q, k) = score_scale q . k + bias[t - s]. When not causal, local_t is over |g(t) - g(s)| < R and grouped_t
    over the whole sequence, own group included, as in the released FLASH. Source: You et al., ICML 2024, section 4, and
    the released code, whose default for a is relu2 on normalised q and k and for phi the identity.

    Args:
        q_BTHD: queries. H is a multiple of K; query head h uses key/value head h // (H / K).
        k_BTKD: keys.
        v_BTKE: values.
        grouped_q_BTHP: queries of the grouped branch where it has its own; needs grouped_k_BTKP.
        grouped_k_BTKP: keys of the grouped branch.
        local: a: relu2, laplace, softmax (normalised over the window), or none to turn the branch off.
        score_scale: factor of q . k.
        bias_XH: added to the score, by distance. Causal: X = S = R * G, row d is distance d. Bidirectional:
            X = 2 * S - 1, row d + S - 1 is distance d = t - s.
        grouped: whether the grouped branch is on.
        feature_map: phi: identity, unit (x / ||x||), relu or elu1.
        normalise: divide queries and keys by their norm first, as `feature_maps.unit` does: in the grouped branch, and
            in the local one unless that is softmax. Not with states, which hold keys as they are multiplied.
        alpha: weight of the grouped branch, one number or one a query head.
        conv_WH: causal filter, row j multiplies v_{t-j}; one a query head or one for all; None turns it off.
        causal: whether a token sees only itself and earlier ones.
        group_size: tokens G in a group.
        local_groups: groups R in the local window.
        segment_ids_BT: every run of equal ids is a sequence of its own, with groups counted from its first token;
            0 is padding, which is not seen and gives 0. None: every row is one sequence.
        initial_state: what went before; the run of the row's first token continues it, if that token is real.
        aligned_state: whether the caller knows that the initial state ends with a group in all rows; without segment
            ids groups then lie alike in all rows, which takes half the local work.
        return_state: also return the state after the last real token (of its sequence; a row of padding keeps its).
        implementation: "xla" (fused), "reference" (the definition, slow), "pallas_tpu" or "pallas_gpu" (kernels;
            simulated on a CPU), or None for the best that runs on the default device, see `explain`.

    Returns:
        y_BTHE in the type of v, and the final state if asked for.

    Raises:
        ValueError: shapes or options that do not fit together, or a named implementation that cannot run.
    """
    inputs = make_inputs(
        q_BTHD,
        k_BTKD,
        v_BTKE,
        grouped_q_BTHP=grouped_q_BTHP,
        grouped_k_BTKP=grouped_k_BTKP,
        local=local,
        score_scale=score_scale,
        bias_XH=bias_XH,
        grouped=grouped,
        feature_map=feature_map,
        normalise=normalise,
        alpha=alpha,
        conv_WH=conv_WH,
        causal=causal,
        group_size=group_size,
        local_groups=local_groups,
        segment_ids_BT=segment_ids_BT,
        initial_state=initial_state,
        aligned_state=aligned_state,
        return_state=return_state,
        implementation=implementation,
    )
    B, T, H, _ = q_BTHD.shape
    if T == 0:
        y_BTHE = jnp.zeros((B, 0, H, v_BTKE.shape[-1]), v_BTKE.dtype)
        return (y_BTHE, inputs.initial_state) if return_state else y_BTHE
    y_BTHE, folded_BKPE = attend(inputs, choose(inputs, implementation).implementation)
    return (y_BTHE, _final_state(inputs, folded_BKPE)) if return_state else y_BTHE


def explain(
    q_BTHD: Float[Array, "B T H D"], k_BTKD: Float[Array, "B T K D"], v_BTKE: Float[Array, "B T K E"], **options: Any
) -> Choice:
    """Which implementation `augmented_attention` takes for these arguments, and why.

    Raises:
        ValueError: as `augmented_attention` does.
    """
    inputs = make_inputs(q_BTHD, k_BTKD, v_BTKE, **{**DEFAULTS, **options})
    return choose(inputs, options.get("implementation"))


def make_inputs(
    q_BTHD: Array,
    k_BTKD: Array,
    v_BTKE: Array,
    *,
    grouped_q_BTHP: Array | None,
    grouped_k_BTKP: Array | None,
    local: str,
    score_scale: float,
    bias_XH: Array | None,
    grouped: bool,
    feature_map: str,
    normalise: bool,
    alpha: Any,
    conv_WH: Array | None,
    causal: bool,
    group_size: int,
    local_groups: int,
    segment_ids_BT: Array | None,
    initial_state: AttentionState | None,
    aligned_state: bool,
    return_state: bool,
    implementation: str | None,
) -> Inputs:
    """The arguments of `augmented_attention`, checked and with defaults filled in."""
    _check_options(local, feature_map, group_size, local_groups, implementation)
    if not causal and (initial_state is not None or return_state):
        raise ValueError("a bidirectional attention has no state: initial_state and return_state need causal=True")
    if normalise and (initial_state is not None or return_state):
        raise ValueError("normalise=True has no state: normalise queries and keys before, with feature_maps.unit")
    _check_shapes(q_BTHD, k_BTKD, v_BTKE, grouped_q_BTHP, grouped_k_BTKP)
    B, T, H, _ = q_BTHD.shape
    taps = 0 if conv_WH is None else conv_WH.shape[0]
    _check_bias(bias_XH, group_size * local_groups, causal)
    empty = empty_state(
        k_BTKD,
        v_BTKE,
        grouped_k_BTKP=grouped_k_BTKP,
        group_size=group_size,
        local_groups=local_groups,
        taps=taps,
    )
    if initial_state is not None:
        _check_state(initial_state, empty)
    return Inputs(
        q_BTHD=q_BTHD,
        k_BTKD=k_BTKD,
        v_BTKE=v_BTKE,
        grouped_q_BTHP=grouped_q_BTHP,
        grouped_k_BTKP=grouped_k_BTKP,
        local=local,
        score_scale=score_scale,
        bias_XH=None if bias_XH is None else _per_head(bias_XH, H),
        grouped=grouped,
        feature_map=feature_map,
        normalise=normalise,
        alpha_H=jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), (H,)),
        conv_WH=None if conv_WH is None or taps == 0 else _per_head(conv_WH, H),
        causal=causal,
        group_size=group_size,
        local_groups=local_groups,
        segment_ids_BT=jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT,
        initial_state=empty if initial_state is None else initial_state,
        aligned=segment_ids_BT is None and (initial_state is None or aligned_state),
        fresh=initial_state is None,
        return_state=return_state,
    )


# The defaults of `augmented_attention`, for `explain`.
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(augmented_attention).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
}


def _final_state(inputs: Inputs, folded_BKPE: Array | None) -> AttentionState:
    return advance(
        inputs.initial_state,
        inputs.k_BTKD,
        inputs.v_BTKE,
        inputs.grouped_k_BTKP,
        token_layout(inputs.segment_ids_BT, inputs.initial_state.length_B),
        group_size=inputs.group_size,
        local_groups=inputs.local_groups,
        feature_map=inputs.feature_map,
        folded_BKPE=folded_BKPE,
    )


def _per_head(x: Float[Array, "rows #H"], heads: int) -> Float[Array, "rows H"]:
    return jnp.broadcast_to(x.astype(jnp.float32), (x.shape[0], heads))


def _check_options(
    local: str, feature_map: str, group_size: int, local_groups: int, implementation: str | None
) -> None:
    if local not in get_args(Local):
        raise ValueError(f"local must be one of {', '.join(get_args(Local))}, but is {local!r}")
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, but is {feature_map!r}")
    if group_size < 1 or local_groups < 1:
        raise ValueError(f"group_size={group_size} and local_groups={local_groups} must be at least 1")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, but is {implementation!r}")


def _check_shapes(q: Array, k: Array, v: Array, grouped_q: Array | None, grouped_k: Array | None) -> None:
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


def _check_bias(bias_XH: Array | None, slots: int, causal: bool) -> None:
    rows = slots if causal else 2 * slots - 1
    if bias_XH is not None and bias_XH.shape[0] != rows:
        raise ValueError(f"bias_XH needs {rows} rows, one a distance in the local window, but has {bias_XH.shape[0]}")


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
