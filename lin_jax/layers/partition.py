"""How arrays lie on a mesh: logical names of their dimensions, and which axes of the mesh cut them."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from lin_jax.ops.shards import Shards

# Logical axis -> mesh axes that cut it, in order.
Rules = tuple[tuple[str, tuple[str, ...]], ...]
# What cuts activations, not parameters: parameters that are cut along with them are gathered before they are used.
ACTIVATIONS = ("batch", "tokens")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Partition:
    """A mesh with one table of rules; without a mesh nothing is cut.

    It has no arrays, so that it can stand among the arguments of transformed functions.

    Attributes:
        mesh: the devices.
        rules: for every logical axis the mesh axes that cut it; see `lin_jax.train.sharding.MESH_AXES`.
    """

    mesh: Mesh | None
    rules: Rules

    def axes(self, name: str | None) -> tuple[str, ...]:
        """Mesh axes that cut a logical axis; the mesh may lack some of the rules'.

        Raises:
            KeyError: there is no such logical axis.
        """
        if self.mesh is None or name is None:
            return ()
        return tuple(axis for axis in dict(self.rules)[name] if self.mesh.shape.get(axis, 1) > 1)

    def shards(self, *names: str | None) -> int:
        """Parts into which arrays are cut along logical axes."""
        return math.prod(self.mesh.shape[axis] for name in names for axis in self.axes(name)) if self.mesh else 1

    def spec(self, names: Sequence[str | None], shape: Sequence[int]) -> tuple[tuple[str, ...] | None, ...]:
        """Mesh axes for every dimension.

        Args:
            names: logical names of the last dimensions; a leading one without a name (stacked layers) is not cut.
            shape: of the array. A dimension that its mesh axes do not divide is not cut, nor is one whose mesh axes
                cut an earlier dimension.
        """
        names = (None,) * (len(shape) - len(names)) + tuple(names)
        used: set[str] = set()
        return tuple(self._cut(name, size, used) for name, size in zip(names, shape, strict=True))

    def _cut(self, name: str | None, size: int, used: set[str]) -> tuple[str, ...] | None:
        axes = self.axes(name)
        if not axes or size % self.shards(name) or used.intersection(axes):
            return None
        used.update(axes)
        return axes

    def place(self, *parts: tuple[str, ...] | None) -> NamedSharding:
        """The mesh axes of every dimension, on the mesh, which there must be."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(*(part or None for part in parts)))

    def sharding(self, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """Where an array with these logical names lies, see `spec`."""
        return self.place(*self.spec(names, shape))

    def constrain(self, x: Array, *names: str | None) -> Array:
        """x, cut along its dimensions' logical names; all of them must be given."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(names, x.shape))

    def gather(self, x: Array, names: Sequence[str | None]) -> Array:
        """A parameter as it is used: whole but for the axes that do not cut activations too."""
        if self.mesh is None:
            return x
        shared = {axis for name in ACTIVATIONS for axis in self.axes(name)}
        kept = (None if shared.intersection(part or ()) else part for part in self.spec(names, x.shape))
        return jax.lax.with_sharding_constraint(x, self.place(*kept))

    def for_ops(self, **names: str) -> Shards | None:
        """Return what ops are told: mesh axes that split rows and tokens, and those of other fields of `Shards`.

        Args:
            names: the logical axis of each of those fields.
        """
        if self.mesh is None or self.mesh.size == 1:
            return None
        further = {field: self.axes(name) for field, name in names.items()}
        return Shards(self.mesh, self.axes("batch"), self.axes("tokens"), **further)


# One device, or whatever the compiler makes of more.
WHOLE = Partition(None, ())
