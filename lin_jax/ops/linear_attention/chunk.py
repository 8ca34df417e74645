"""Augmented attention of one head and one block of tokens, and its adjoint: what every kernel computes.

Pure functions of arrays with one or two axes, so that a kernel of any backend can call them on what it has loaded. A
block is `rows` queries; its window is the `slots` tokens that it sees one by one, its own among them. All tokens before
the window are in a state [P, E]. With the masks near, far and band over [rows, slots],

    weights = near a(scale q k^T + bias) + far alpha phi(q) phi(k)^T + band taps
    y       = weights v + own alpha phi(q) state

so one product with the values serves all three branches. Gradients are written by hand: two functions, one for what
belongs to queries and one for what belongs to keys, as kernels visit blocks in another order for each.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lin_jax.ops.linear_attention.arguments import AttentionOptions
from lin_jax.ops.linear_attention.feature_maps import FEATURE_MAPS, identity, unit, unit_gradient
from lin_jax.ops.linear_attention.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class Form:
    """The static options of the op that a block depends on, see `augmented_attention`.

    Attributes:
        unit_scores: whether the local branch scores unit vectors.
        own_grouped: whether the grouped branch has its own queries and keys.
    """

    local: str
    score_scale: float
    grouped: bool
    feature_map: str
    normalise: bool
    unit_scores: bool
    own_grouped: bool

    @property
    def scored(self) -> bool:
        """Whether the local branch is on."""
        return self.local != "none"

    @property
    def shared(self) -> bool:
        """Whether both branches multiply the very same queries and keys, so that one product serves both."""
        same = self.feature_map == "identity" and self.normalise == self.unit_scores
        return self.scored and self.grouped and not self.own_grouped and same


def form_of(inputs: Inputs) -> Form:
    """Return the options of a block."""
    options = inputs.options
    return Form(
        local=options.local,
        score_scale=options.score_scale,
        grouped=options.grouped,
        feature_map=options.inner_map.name,
        normalise=options.normalise,
        unit_scores=options.unit_scores,
        own_grouped=inputs.own_grouped,
    )


class BlockOperands(NamedTuple):
    """Queries and keys as they are multiplied: after normalisation and feature map. None: the branch has none.

    Where `Form.shared` holds, the grouped ones are the local ones.
    """

    query: Array | None
    key: Array | None
    grouped_query: Array | None
    grouped_key: Array | None


class Masks(NamedTuple):
    """Which slots of the window [rows, slots] each query sees in which branch; None is everywhere.

    Attributes:
        near: local branch.
        far: grouped branch.
        band: convolution.
        own: [rows, 1], whether the state is of the query's sequence.
    """

    near: Array | None
    far: Array | None
    band: Array | None
    own: Array | None


class Bands(NamedTuple):
    """Entries that depend on the distance alone, float32 [rows, slots]; None where there is no such term."""

    bias: Array | None
    taps: Array | None


class QueryGradients(NamedTuple):
    """Gradients of a block, float32: of its queries as they were multiplied, and of what all blocks share.

    `bias` and `taps` are by entry of the bands [rows, slots]; `alpha` is [1, 1].
    """

    query: Array | None
    grouped_query: Array | None
    alpha: Array | None
    bias: Array | None
    taps: Array | None


class KeyGradients(NamedTuple):
    """Gradients that a block gives to its window [slots, ...] and to the state before it, float32."""

    key: Array | None
    grouped_key: Array | None
    value: Array
    state: Array | None


# Products: in the type of their inputs, summed in float32.


def times(a: Array, b: Array) -> Array:
    """a b."""
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def times_transposed(a: Array, b: Array) -> Array:
    """a b^T."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def transposed_times(a: Array, b: Array) -> Array:
    """a^T b."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


# What becomes of queries and keys before they are multiplied, and the adjoints.


class BlockMap(NamedTuple):
    """A feature map as kernels have it, see `FeatureMap`.

    Attributes:
        apply: phi, of operations that every backend has; its gradient is the map's own.
        keeps_zero: whether phi(0) is 0, as channels that do not exist are.
    """

    apply: Callable[[Array], Array]
    keeps_zero: bool


def _relu(x: Array) -> Array:
    return jnp.maximum(x, jnp.zeros_like(x))


def _elu1(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    return jnp.where(wide > 0, wide + 1, jnp.exp(jnp.minimum(wide, 0.0))).astype(x.dtype)


# The maps that kernels know; they refuse others.
MAPS = {
    "identity": BlockMap(identity, keeps_zero=True),
    "unit": BlockMap(unit, keeps_zero=True),
    "relu": BlockMap(_relu, keeps_zero=True),
    "elu1": BlockMap(_elu1, keeps_zero=False),
}


def operand(form: Form, x: Array, grouped: Array | None) -> tuple[Array | None, Array | None]:
    """Queries (or keys) of both branches as they are multiplied.

    Args:
        form: static options.
        x: queries of the local branch, and of the grouped one unless it has its own.
        grouped: the grouped branch's own.
    """
    local = None
    if form.scored:
        local = unit(x) if form.unit_scores else x
    if form.shared or not form.grouped:
        return local, local if form.shared else None
    source = x if grouped is None else grouped
    return local, MAPS[form.feature_map].apply(unit(source) if form.normalise else source)


def operand_gradients(
    form: Form, x: Array, grouped: Array | None, local_gradient: Array | None, grouped_gradient: Array | None
) -> tuple[Array, Array | None]:
    """Gradients of `x` and `grouped` in `operand`, float32, from those of its results."""
    from_local: Array | float = 0.0
    from_grouped: Array | float = 0.0
    if local_gradient is not None:
        from_local = unit_gradient(x, local_gradient) if form.unit_scores else local_gradient
    if grouped_gradient is not None:
        source = x if grouped is None else grouped
        scaled = unit(source) if form.normalise else source
        of_map = FEATURE_MAPS[form.feature_map].gradient
        assert of_map is not None
        from_grouped = of_map(scaled, grouped_gradient)
        from_grouped = unit_gradient(source, from_grouped) if form.normalise else from_grouped
    if grouped is not None:
        return from_local + jnp.zeros(x.shape, jnp.float32), from_grouped + jnp.zeros(grouped.shape, jnp.float32)
    return from_local + from_grouped + jnp.zeros(x.shape, jnp.float32), None


# Weights.


def erf(x: Array) -> Array:
    """The error function to 1.5e-7 (Abramowitz and Stegun 7.1.26), of operations that every backend has."""
    positive = jnp.abs(x)
    t = 1 / (1 + 0.3275911 * positive)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    magnitude = 1 - series * jnp.exp(-jnp.square(x))
    return jnp.where(x < 0, -magnitude, magnitude)


class BlockActivation(NamedTuple):
    """An activation as kernels have it, see `lin_jax.ops.activations`.

    Attributes:
        weights: a(score) where a mask holds (None: everywhere), else 0.
        gradient: of the scores, from the scores, the weights, the mask and the gradient of the weights.
    """

    weights: Callable[[Array, Array | None], Array]
    gradient: Callable[[Array, Array, Array | None, Array], Array]


def _softmax(score: Array, near: Array | None) -> Array:
    lowest = float(jnp.finfo(jnp.float32).min)
    score = _where(near, score, lowest)
    weight = _where(near, jnp.exp(score - jnp.max(score, axis=-1, keepdims=True)), 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1.0)


def _softmax_gradient(score: Array, weight: Array, near: Array | None, gradient: Array) -> Array:
    return weight * (gradient - jnp.sum(weight * gradient, axis=-1, keepdims=True))


def _laplace(score: Array, near: Array | None) -> Array:
    # mean sqrt(1/2), variance 1 / (4 pi)
    return _where(near, 0.5 * (1 + erf((score - 0.5**0.5) * (2 * jnp.pi) ** 0.5)), 0.0)


def _laplace_gradient(score: Array, weight: Array, near: Array | None, gradient: Array) -> Array:
    slope = 2**0.5 * jnp.exp(-2 * jnp.pi * jnp.square(score - 0.5**0.5))
    return _where(near, slope * gradient, 0.0)


def _relu2(score: Array, near: Array | None) -> Array:
    return _where(near, jnp.square(jnp.maximum(score, 0.0)), 0.0)


def _relu2_gradient(score: Array, weight: Array, near: Array | None, gradient: Array) -> Array:
    return _where(near, 2 * jnp.maximum(score, 0.0) * gradient, 0.0)


# The activations that kernels know; they refuse others.
ACTIVATIONS = {
    "relu2": BlockActivation(_relu2, _relu2_gradient),
    "laplace": BlockActivation(_laplace, _laplace_gradient),
    "softmax": BlockActivation(_softmax, _softmax_gradient),
}


def refusal(options: AttentionOptions) -> str | None:
    """Return why no kernel runs with these options, or None."""
    if not options.causal:
        return "it is causal only"
    if options.grouped and options.inner_map.name not in MAPS:
        return f"it does not know feature_map={options.feature_map}; it knows {', '.join(MAPS)}"
    if options.scored and options.local not in ACTIVATIONS:
        return f"it does not know local={options.local}; it knows {', '.join(ACTIVATIONS)}"
    return None


def _where(mask: Array | None, x: Array, otherwise: float) -> Array:
    return x if mask is None else jnp.where(mask, x, otherwise)


class _Weights(NamedTuple):
    """Float32 [rows, slots]: scores of the local branch, a of them, and the weights of all branches."""

    score: Any  # None where the branch is off
    local: Any
    total: Array


def _weights(form: Form, x: BlockOperands, alpha: Array, masks: Masks, bands: Bands) -> _Weights:
    score = local = grouped = None
    terms = []
    if x.query is not None and x.key is not None:
        product = times_transposed(x.query, x.key)
        grouped = product if form.shared else None
        score = product * form.score_scale
        score = score if bands.bias is None else score + bands.bias
        local = ACTIVATIONS[form.local].weights(score, masks.near)
        terms.append(local)
    if x.grouped_query is not None and x.grouped_key is not None:
        grouped = times_transposed(x.grouped_query, x.grouped_key) if grouped is None else grouped
        terms.append(_where(masks.far, alpha * grouped, 0.0))
    if bands.taps is not None:
        terms.append(_where(masks.band, bands.taps, 0.0))
    return _Weights(score, local, sum(terms[1:], terms[0]))


# A block, and its adjoint.


def attend(
    form: Form, x: BlockOperands, value: Array, state: Array | None, alpha: Array, masks: Masks, bands: Bands
) -> Array:
    """Outputs of a block, float32 [rows, E].

    Args:
        form: static options; at least one of the three branches must be on.
        x: queries [rows, D] and keys [slots, D], or P.
        value: [slots, E].
        state: float32 [P, E]; None counts as 0.
        alpha: float32 scalar or [1, 1]; any where the grouped branch is off.
        masks: which slots are seen.
        bands: bias and taps.
    """
    y = times(_weights(form, x, alpha, masks, bands).total.astype(value.dtype), value)
    if x.grouped_query is None or state is None:
        return y
    return y + _where(masks.own, alpha * times(x.grouped_query, state.astype(x.grouped_query.dtype)), 0.0)


def fold(grouped_key: Array, value: Array, mask: Array | None) -> Array:
    """What tokens add to the state, float32 [P, E]: the sum of phi(k) v^T. `mask` is [tokens, 1]."""
    return transposed_times(_where(mask, grouped_key, 0.0), value)


def fold_gradients(grouped_key: Array, value: Array, mask: Array | None, state_gradient: Array) -> tuple[Array, Array]:
    """Gradients of `grouped_key` and `value` in `fold`, float32."""
    narrow = state_gradient.astype(value.dtype)
    key_gradient = times_transposed(value, narrow)
    value_gradient = times(_where(mask, grouped_key, 0.0), narrow)
    return _where(mask, key_gradient, 0.0), value_gradient


def query_gradients(
    form: Form,
    x: BlockOperands,
    value: Array,
    state: Array | None,
    alpha: Array,
    masks: Masks,
    bands: Bands,
    y_gradient: Array,
) -> QueryGradients:
    """The gradients that `attend` gives to its queries, alpha and bands, from that of y [rows, E]."""
    weights, weight_gradient = _weights(form, x, alpha, masks, bands), times_transposed(y_gradient, value)
    query = grouped_query = alpha_gradient = bias = None
    if x.query is not None and x.key is not None:
        score_gradient = ACTIVATIONS[form.local].gradient(weights.score, weights.local, masks.near, weight_gradient)
        bias = None if bands.bias is None else score_gradient
        query = form.score_scale * times(score_gradient.astype(x.key.dtype), x.key)
    if x.grouped_query is not None and x.grouped_key is not None:
        seen = _where(masks.far, weight_gradient, 0.0)
        # All that alpha multiplies, as a gradient of the queries: its product with them is the gradient of alpha.
        unweighted = times(seen.astype(x.grouped_key.dtype), x.grouped_key)
        if state is not None:
            from_state = times_transposed(y_gradient, state.astype(y_gradient.dtype))
            unweighted += _where(masks.own, from_state, 0.0)
        alpha_gradient = _total(unweighted * x.grouped_query.astype(jnp.float32))
        grouped_query = alpha * unweighted
    taps = None if bands.taps is None else _where(masks.band, weight_gradient, 0.0)
    return QueryGradients(query, grouped_query, alpha_gradient, bias, taps)


def key_gradients(
    form: Form, x: BlockOperands, value: Array, alpha: Array, masks: Masks, bands: Bands, y_gradient: Array
) -> KeyGradients:
    """The gradients that `attend` gives to the keys and values of its window and to its state."""
    weights, weight_gradient = _weights(form, x, alpha, masks, bands), times_transposed(y_gradient, value)
    key = grouped_key = state = None
    if x.query is not None and x.key is not None:
        score_gradient = ACTIVATIONS[form.local].gradient(weights.score, weights.local, masks.near, weight_gradient)
        key = form.score_scale * transposed_times(score_gradient.astype(x.query.dtype), x.query)
    if x.grouped_query is not None and x.grouped_key is not None:
        seen = _where(masks.far, alpha * weight_gradient, 0.0)
        grouped_key = transposed_times(seen.astype(x.grouped_query.dtype), x.grouped_query)
        state = alpha * transposed_times(_where(masks.own, x.grouped_query, 0.0), y_gradient)
    return KeyGradients(key, grouped_key, transposed_times(weights.total.astype(y_gradient.dtype), y_gradient), state)


def _total(x: Array) -> Array:
    return jnp.sum(jnp.sum(x, axis=1, keepdims=True), axis=0, keepdims=True)
