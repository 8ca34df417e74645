"""The arguments of augmented linear attention, stated once: `AttentionOptions` are static, `AttentionArrays` are not.

Every function of the op takes them: whole rows, rows over a mesh, chunks after a state, trees, and commits.
"""

import dataclasses
from collections.abc import Collection

import jax.numpy as jnp
from jaxtyping import Array, Float

from lin_jax.ops.activations import ACTIVATIONS
from lin_jax.ops.linear_attention.feature_maps import FEATURE_MAPS, FeatureMap, MapArrays, unit

# The forms of the op, see `lin_jax.ops.linear_attention.select`.
IMPLEMENTATIONS = ("xla", "reference", "pallas_tpu", "pallas_gpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What is static, and hashable.

    Attributes:
        group_size: tokens G in a group.
        local_groups: groups R in the local window.
        local: a, a name in `ACTIVATIONS`: relu2, laplace, softmax (normalised over the window); or none to turn the
            local branch off.
        score_scale: factor of q . k.
        grouped: whether the grouped branch is on.
        feature_map: phi, a name in `FEATURE_MAPS`.
        normalise: divide queries and keys by their norm first, as `feature_maps.unit` does: in the grouped branch, and
            in the local one unless that is softmax. Not with states, which hold keys as they are multiplied.
        causal: whether a token sees only itself and earlier ones.
        implementation: a name in `IMPLEMENTATIONS`: xla (fused), reference (the definition, slow), pallas_tpu or
            pallas_gpu (kernels; simulated on a CPU), or None for the best that runs on the default device.

    Raises:
        ValueError: a name that is not in its table, or a size below 1.
    """

    group_size: int
    local_groups: int = 1
    local: str = "relu2"
    score_scale: float = 1.0
    grouped: bool = True
    feature_map: str = "identity"
    normalise: bool = False
    causal: bool = True
    implementation: str | None = None

    def __post_init__(self):
        _check_name("local", self.local, (*ACTIVATIONS, "none"))
        _check_name("feature_map", self.feature_map, FEATURE_MAPS)
        if self.group_size < 1 or self.local_groups < 1:
            raise ValueError(f"group_size={self.group_size} and local_groups={self.local_groups} must be at least 1")
        if self.implementation is not None:
            _check_name("implementation", self.implementation, IMPLEMENTATIONS)

    @property
    def slots(self) -> int:
        """Return the slots S in the local window."""
        return self.group_size * self.local_groups

    @property
    def scored(self) -> bool:
        """Return whether the local branch is on."""
        return self.local != "none"

    @property
    def inner_map(self) -> FeatureMap:
        """Return the map that is applied inside blocks: the identity where it has arrays, see `with_features`."""
        feature_map = FEATURE_MAPS[self.feature_map]
        return FEATURE_MAPS["identity"] if feature_map.arrays else feature_map

    @property
    def unit_scores(self) -> bool:
        """Return whether the local branch is to score unit vectors."""
        return self.normalise and (not self.scored or ACTIVATIONS[self.local].of_unit_vectors)


@dataclasses.dataclass(frozen=True)
class AttentionArrays:
    """What is computed with. Tokens may be rows, or the nodes of a tree.

    Attributes:
        q_BTHD: queries. H is a multiple of K; query head h uses key/value head h // (H / K).
        k_BTKD: keys.
        v_BTKE: values.
        grouped_q_BTHP: queries of the grouped branch where it has its own; needs grouped_k_BTKP.
        grouped_k_BTKP: keys of the grouped branch.
        bias_XH: added to the score, by distance. Causal: X = S = R * G, row d is distance d. Bidirectional:
            X = 2 * S - 1, row d + S - 1 is distance d = t - s.
        alpha_H: weight of the grouped branch, one number or one a query head.
        conv_WH: causal filter, row j multiplies v_{t-j}; one a query head or one for all; None turns it off.
        features: the arrays of a feature map that has some.
    """

    q_BTHD: Float[Array, "B T H D"]
    k_BTKD: Float[Array, "B T K D"]
    v_BTKE: Float[Array, "B T K E"]
    grouped_q_BTHP: Float[Array, "B T H P"] | None = None
    grouped_k_BTKP: Float[Array, "B T K P"] | None = None
    bias_XH: Float[Array, "X #H"] | None = None
    alpha_H: Float[Array, " #H"] | Float[Array, ""] | float = 1.0
    conv_WH: Float[Array, "W #H"] | None = None
    features: MapArrays | None = None

    @property
    def tokens(self) -> list[Array]:
        """Return all queries, keys and values."""
        given = (self.q_BTHD, self.k_BTKD, self.v_BTKE, self.grouped_q_BTHP, self.grouped_k_BTKP)
        return [array for array in given if array is not None]

    @property
    def taps(self) -> int:
        """Return the taps W of the convolution, 0 where it is off."""
        return 0 if self.conv_WH is None else self.conv_WH.shape[0]


def with_features(arrays: AttentionArrays, options: AttentionOptions) -> tuple[AttentionArrays, AttentionOptions]:
    """Return arguments in which a feature map that has arrays is applied: its features are the grouped branch's own.

    Other maps are applied inside blocks, and nothing changes here.

    Raises:
        ValueError: arrays of the map are missing or too many.
    """
    feature_map, given = FEATURE_MAPS[options.feature_map], arrays.features
    names = [array.name for array in feature_map.arrays]
    if given is not None and not len(given.query) == len(given.key) == len(names):
        raise ValueError(f"feature_map={feature_map.name} needs {len(names)} arrays for queries and for keys: {names}")
    if not names:
        return arrays, options
    plain = dataclasses.replace(options, feature_map="identity")
    if not options.grouped:
        return arrays, plain
    if given is None:
        raise ValueError(f"feature_map={feature_map.name} needs features: {', '.join(names)}")
    q, k = arrays.q_BTHD, arrays.k_BTKD
    grouped_q = q if arrays.grouped_q_BTHP is None else arrays.grouped_q_BTHP
    grouped_k = k if arrays.grouped_k_BTKP is None else arrays.grouped_k_BTKP
    if options.normalise:
        grouped_q, grouped_k = unit(grouped_q), unit(grouped_k)
        q, k = (unit(q), unit(k)) if options.unit_scores else (q, k)
    arrays = dataclasses.replace(
        arrays,
        q_BTHD=q,
        k_BTKD=k,
        grouped_q_BTHP=feature_map.apply(grouped_q, *given.query),
        grouped_k_BTKP=feature_map.apply(grouped_k, *given.key),
        features=None,
    )
    return arrays, dataclasses.replace(plain, normalise=False)


def with_unit_vectors(arrays: AttentionArrays, options: AttentionOptions) -> AttentionArrays:
    """Return the arrays with queries and keys that are normalised already, where `options.normalise` asks for it."""
    if not options.normalise:
        return arrays
    q, k = arrays.q_BTHD, arrays.k_BTKD
    grouped_q, grouped_k = arrays.grouped_q_BTHP, arrays.grouped_k_BTKP
    if options.grouped and grouped_q is not None and grouped_k is not None:
        grouped_q, grouped_k = unit(grouped_q), unit(grouped_k)
    elif options.grouped and not options.unit_scores:
        grouped_q, grouped_k = unit(q), unit(k)
    if options.unit_scores:
        q, k = unit(q), unit(k)
    return dataclasses.replace(arrays, q_BTHD=q, k_BTKD=k, grouped_q_BTHP=grouped_q, grouped_k_BTKP=grouped_k)


def refuse_states(options: AttentionOptions) -> None:
    """Raise `ValueError` for options with which there are no states."""
    if not options.causal:
        raise ValueError("a bidirectional attention has no state: initial_state and return_state need causal=True")
    if options.normalise:
        raise ValueError("normalise=True has no state: normalise queries and keys before, with feature_maps.unit")


def per_head(x_H: Array | float, heads: int) -> Float[Array, " H"]:
    """Return one float32 number a query head."""
    return jnp.broadcast_to(jnp.asarray(x_H, jnp.float32), (heads,))


def _check_name(field: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"{field} must be one of {', '.join(known)}, but is {name!r}")
