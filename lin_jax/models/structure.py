"""A model without its numbers: what is needed to put it together from plain trees of arrays.

Jitted functions take these trees and put the module together inside (`Structure.merge`); `nnx.jit` would compare the
whole module at every call.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from flax import nnx

from lin_jax.layers.parameter import Path, Role, roles_by_path
from lin_jax.layers.partition import Partition

Create = Callable[[nnx.Rngs], nnx.Module]
Start = Callable[[nnx.Module, Iterable[str]], None]


@dataclasses.dataclass(frozen=True)
class Structure:
    """A model without its numbers: what is needed to put it together from trees of arrays.

    Attributes:
        create: makes the model with new parameters.
        graph: the module without its variables.
        abstract_parameters: shapes of all parameters, trained or not.
        abstract_constants: shapes of the other variables.
        trains: whether the parameter at a path is trained.
        frozen_dtype: type in which the others are held.
        keeps_start: whether `frozen` holds all parameters, the trained ones as they were at the start.
        start: sets what is new in a model whose other parameters, those of the given paths, are in place.
    """

    create: Create
    graph: Any
    abstract_parameters: Any
    abstract_constants: Any
    trains: Callable[[Path], bool]
    frozen_dtype: str
    keeps_start: bool
    start: Start

    def split(self, parameters: Any) -> tuple[Any, Any]:
        """A tree with a leaf a parameter as (trained, frozen)."""
        flat = nnx.traversals.flatten_mapping(parameters)
        trained = {path: leaf for path, leaf in flat.items() if self.trains(path)}
        frozen = {path: leaf for path, leaf in flat.items() if self.keeps_start or path not in trained}
        return nnx.traversals.unflatten_mapping(trained), nnx.traversals.unflatten_mapping(frozen)

    def join(self, trained: Any, frozen: Any) -> Any:
        """All parameters, of what `split` gives."""
        flat = nnx.traversals.flatten_mapping(frozen) | nnx.traversals.flatten_mapping(trained)
        return nnx.traversals.unflatten_mapping(flat)

    @property
    def has_frozen(self) -> bool:
        """Whether any parameter is held that is not trained."""
        return bool(self.split(self.metadata("decay"))[1])

    def merge(self, parameters: Any, constants: Any) -> Any:
        """The module with all of its parameters and constants."""
        states = []
        for abstract, values in ((self.abstract_parameters, parameters), (self.abstract_constants, constants)):
            state = jax.tree.map(lambda leaf: leaf, abstract)
            nnx.replace_by_pure_dict(state, values)
            states.append(state)
        return nnx.merge(self.graph, *states)

    def complete(self, parameters: Any, constants: Any, known: Iterable[str]) -> Any:
        """Return all parameters, of which those that are not `known` are new, as `start` sets them."""
        model = self.merge(parameters, constants)
        self.start(model, known)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def initialise(self, seed: jax.Array) -> tuple[Any, Any]:
        """Return parameters and constants of a new model."""
        _, parameters, constants = nnx.split(self.create(nnx.Rngs(jax.random.key(seed))), nnx.Param, ...)
        return _strong(nnx.to_pure_dict(parameters)), _strong(nnx.to_pure_dict(constants))

    def metadata(self, name: str) -> Any:
        """The metadata `name` of every parameter, as a tree like the parameters."""
        return self._map_parameters(lambda variable: getattr(variable, name))

    def parameter_shardings(self, partition: Partition) -> Any:
        """Where every parameter lies, by its metadata `axes`."""
        return self._map_parameters(lambda v: partition.sharding(v.axes, v.get_value().shape))

    def constant_shardings(self, partition: Partition) -> Any:
        """Return where every constant lies, by its metadata `axes`."""
        flat = nnx.to_flat_state(self.abstract_constants)
        lie = {path: partition.sharding(v.axes, v.get_value().shape) for path, v in flat}
        return nnx.traversals.unflatten_mapping(lie)

    def gather(self, parameters: Any, partition: Partition) -> Any:
        """`parameters` with those that are not stacked layers gathered over what cuts the batch.

        Left to itself the compiler keeps what it looks up in a cut embedding cut along the width, and with it all
        activations, and gathers the batch instead. Stacked layers are gathered one at a time inside the scan.
        """

        def gather(variable: nnx.Variable, array: jax.Array) -> jax.Array:
            stacked = len(variable.get_value().shape) > len(variable.axes)
            return array if stacked else partition.gather(array, variable.axes)

        return self._map_parameters(gather, parameters)

    def model(self, trained: Any, frozen: Any, constants: Any, partition: Partition) -> Any:
        """The module of a step: `merge` of all parameters, gathered."""
        return self.merge(self.gather(self.join(trained, frozen), partition), constants)

    def _map_parameters(self, function: Callable[..., Any], *trees: Any) -> Any:
        """A tree like the parameters, of what `function` gives for each variable and its leaves of `trees`."""
        flat, leaves = nnx.to_flat_state(self.abstract_parameters), [nnx.traversals.flatten_mapping(t) for t in trees]
        return nnx.traversals.unflatten_mapping({p: function(v, *(t[p] for t in leaves)) for p, v in flat})


def _strong(tree: Any) -> Any:
    """`tree` without weak types, which a checkpoint does not keep."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), tree)


def _leave(model: nnx.Module, known: Iterable[str]) -> None:
    """Nothing is new."""


def make_structure(
    create: Create,
    trains: Callable[[Path, Sequence[Role]], bool] = lambda path, roles: True,
    *,
    frozen_dtype: str = "float32",
    keeps_start: bool = False,
    start: Start = _leave,
) -> Structure:
    """The structure of the model that `create` makes, without computing its parameters; see `Structure`."""
    graph, parameters, constants = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))), nnx.Param, ...)
    trained = {path for path, roles in roles_by_path(parameters).items() if trains(path, roles)}
    return Structure(create, graph, parameters, constants, trained.__contains__, frozen_dtype, keeps_start, start)
