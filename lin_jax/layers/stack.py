"""Many equal layers as one: parameters stacked along a leading axis, run by a scan, so that depth compiles once."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array

from lin_jax.layers.partition import WHOLE, Partition

Layer = TypeVar("Layer", bound=nnx.Module)
Carry = TypeVar("Carry")

REMAT_POLICIES: dict[str, Callable | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack_layers(make: Callable[[nnx.Rngs], Layer], depth: int, rngs: nnx.Rngs) -> Layer:
    """`depth` layers, each with random numbers of its own, as one module with an axis L in front of every array."""
    create = nnx.vmap(make, in_axes=0, out_axes=0)
    return nnx.split_rngs(splits=depth)(create)(rngs)


def run_layers(
    layers: nnx.Module,
    x: Carry,
    *shared: Any,
    remat: str = "none",
    kinds: Sequence[Any] | None = None,
    partition: Partition = WHOLE,
    dropout_key: Array | None = None,
) -> Carry:
    """Return x after all layers in turn, each called as `layer(x, *shared)`.

    Args:
        layers: from `stack_layers`.
        x: input of the first layer, an array or a tree of them.
        shared: further arguments, the same for all layers.
        remat: what the backward pass recomputes: "none", "full" (all of a layer) or "dots" (all but its products with
            parameters).
        kinds: a kind for each layer, which is then `layer.of_kind(kind)`. Neighbours of one kind run as one scan.
        partition: how the features that go from layer to layer are cut.
        dropout_key: layers are called with `dropout_key`, each with another; None: without.
    """
    graph, arrays = nnx.split(layers)
    if dropout_key is not None:
        keys = jax.random.split(dropout_key, jax.tree.leaves(arrays)[0].shape[0])
        arrays = (arrays, keys)

    def rows(x):
        return partition.constrain(x, *("batch", "tokens", None)[: x.ndim])

    def step(x, layer_arrays, shared, kind):
        layer_arrays, key = layer_arrays if dropout_key is not None else (layer_arrays, None)
        layer = nnx.merge(graph, layer_arrays)
        options = {} if key is None else {"dropout_key": key}
        return jax.tree.map(rows, (layer if kind is None else layer.of_kind(kind))(x, *shared, **options))

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], static_argnums=3)

    def scan(x, arrays, kind):
        return jax.lax.scan(lambda x, layer_arrays: (step(x, layer_arrays, shared, kind), None), x, arrays)[0]

    if kinds is None:
        return scan(x, arrays, None)
    start = 0
    for kind, run in itertools.groupby(kinds):
        stop = start + len(list(run))
        # A slice copies its layers' parameters; the common case of one kind needs none.
        part = arrays if stop - start == len(kinds) else jax.tree.map(lambda a, i=start, j=stop: a[i:j], arrays)
        x, start = scan(x, part, kind), stop
    return x


def unstack_layers(layers: Any, depth: int) -> Any:
    """The layers of `stack_layers` one by one, each with arrays of its own.

    Decoding reads every parameter once a token. From a stack each layer would first be copied out, which takes as long
    as the rest of a step of one token does.
    """
    graph, arrays = nnx.split(layers)
    return nnx.List([nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], arrays)) for i in range(depth)])


def each_layer(layers: Any, depth: int) -> Sequence[Any]:
    """The layers in turn, of a stack or of `unstack_layers`."""
    return list(layers) if isinstance(layers, nnx.List) else list(unstack_layers(layers, depth))
