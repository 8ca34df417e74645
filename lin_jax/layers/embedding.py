"""Rows of a table, which may be split over devices along the vocabulary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.layers.partition import Partition


def look_up(table_VC: Float[Array, "V C"], tokens_BT: Int[Array, "B T"], partition: Partition) -> Float[Array, "B T C"]:
    """Return the table's rows of tokens; a device looks up those that it has, and the others' are added."""
    axes, shards = partition.spec(("vocabulary", None), table_VC.shape)[0], partition.for_ops(vocabulary="vocabulary")
    if shards is None or axes is None:
        return partition.constrain(table_VC[tokens_BT], "batch", "tokens", None)

    def of_part(table_VC: Array, tokens_BT: Array) -> Array:
        V = table_VC.shape[0]
        index_BT = tokens_BT - V * jax.lax.axis_index(axes)
        own_BT = (index_BT >= 0) & (index_BT < V)
        found_BTC = jnp.where(own_BT[..., None], table_VC[jnp.where(own_BT, index_BT, 0)], 0)
        return jax.lax.psum(found_BTC, axes)

    arrays, shape = {"table_VC": table_VC, "tokens_BT": tokens_BT}, (*tokens_BT.shape, table_VC.shape[1])
    return shards.run(of_part, arrays, {"table_VC": "VC", "tokens_BT": "BT"}, "BTC", shape)
