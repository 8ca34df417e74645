"""Ops on arrays that are split over a mesh: each device runs its part; what crosses devices is told, not inferred."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array


@jax.tree_util.register_static  # Rows, which hold it, go through `jax.checkpoint` as arguments.
@dataclasses.dataclass(frozen=True)
class Shards:
    """The mesh, and its axes that split rows B, tokens T, heads H and K, channels E of the values, and vocabulary V.

    They divide the sizes.
    """

    mesh: Mesh
    batch: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()

    @property
    def parts(self) -> int:
        """Return the number of parts of a row."""
        return math.prod(self.mesh.shape[axis] for axis in self.tokens)

    def spec(self, axes: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Return mesh axes of an array whose axes are these letters of the legend; those of size 1 are not split."""
        by_letter = {"B": self.batch, "T": self.tokens, "H": self.heads, "K": self.heads}
        by_letter |= {"E": self.values, "V": self.vocabulary}
        parts = (by_letter.get(axis) or None for axis in axes)
        return PartitionSpec(*(part if size > 1 else None for part, size in zip(parts, shape, strict=True)))

    def run(
        self,
        f: Callable[..., Array],
        arrays: Mapping[str, Array | None],
        axes: Mapping[str, str],
        out: str,
        shape: tuple[int, ...],
    ) -> Array:
        """Return `f` of every device's part of `arrays`.

        Args:
            f: takes the arrays by name.
            arrays: what it takes. None stays None.
            axes: the letters of each array that is given.
            out: those of the result.
            shape: of the whole result.
        """
        given = {name: array for name, array in arrays.items() if array is not None}
        missing = dict.fromkeys(name for name, array in arrays.items() if array is None)

        def of_parts(parts: dict[str, Array]) -> Array:
            return f(**parts, **missing)

        # What the specs call whole is so by construction; the checker does not know everything that kernels use.
        sharded: Callable[[dict[str, Any]], Array] = jax.shard_map(
            of_parts,
            mesh=self.mesh,
            in_specs=({name: self.spec(axes[name], array.shape) for name, array in given.items()},),
            out_specs=self.spec(out, shape),
            check_vma=False,
        )
        return sharded(given)
