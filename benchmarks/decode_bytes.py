"""What a decoding step's attention moves through device memory, by the compiler's count for a TPU that is not here.

    python -m benchmarks.decode_bytes [--target v5e] [--rows 1 16] [--nodes 1 26]

One layer of LLaMA-2-7B's attention (bfloat16; state, window and the last values as `AttentionState` has them): the
program of `verify_tree`, and that program with `commit_path`, beside the least bytes (everything that it reads or
writes, once) and beside the layer's weights, which a step reads too. Needs libtpu, see `benchmarks.aot`; nothing runs.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import aot
from benchmarks.common import print_table
from lin_jax.ops.linear_attention import AttentionArrays, AttentionOptions
from lin_jax.ops.linear_attention.state import Pending, empty_state
from lin_jax.ops.linear_attention.verify import commit_path, verify_tree
from lin_jax.ops.tree import chain

H, D, G, W = 32, 128, 64, 32
OPTIONS = AttentionOptions(group_size=G)
# Projections of queries, keys, values and outputs, and the three of the feed-forward block.
LAYER_BYTES = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)


def verify(q: Any, k: Any, v: Any, alpha: Any, conv: Any, state: Any) -> Any:
    """The outputs of a chain of nodes."""
    return verify_tree(AttentionArrays(q, k, v, alpha_H=alpha, conv_WH=conv), chain(q.shape[1]), state, OPTIONS)


def step(q: Any, k: Any, v: Any, alpha: Any, conv: Any, state: Any) -> Any:
    """These, and the state after all nodes."""
    path = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    count = jnp.full(q.shape[:1], q.shape[1], jnp.int32)
    after = commit_path(state, Pending(k, None, v), path, count, OPTIONS)
    return verify(q, k, v, alpha, conv, state), after


def count_bytes(function: Any, rows: int, nodes: int, device: Any) -> tuple[int, int]:
    """Bytes that the compiled program accesses, and of its arguments and results."""
    place = NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec())
    tokens = jax.ShapeDtypeStruct((rows, nodes, H, D), jnp.bfloat16)
    state = jax.eval_shape(lambda k, v: empty_state(k, v, OPTIONS, taps=W), tokens, tokens)
    weights = jax.ShapeDtypeStruct((H,), jnp.float32), jax.ShapeDtypeStruct((W, H), jnp.float32)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (tokens,) * 3 + weights + (state,)
    )
    # As in the library's loop, the state's memory is used again.
    donated = (5,) if function is step else ()
    lowered = jax.jit(function, donate_argnums=donated).trace(*arguments).lower(lowering_platforms=("tpu",))
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    least = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return int(compiled.cost_analysis()["bytes accessed"]), least


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="v5e", choices=aot.TPUS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 26])
    options = parser.parse_args()
    aot.prepare(options.target)
    device, table = aot.devices(options.target)[0], []
    for function in (verify, step):
        for rows in options.rows:
            for nodes in options.nodes:
                moved, least = count_bytes(function, rows, nodes, device)
                cells = [f"{least / 1e6:.2f}", f"{moved / 1e6:.2f}", f"{moved / least:.2f}"]
                table.append([function.__name__, str(rows), str(nodes), *cells, f"{moved / LAYER_BYTES:.1%}"])
    print_table(["program", "rows", "nodes", "least MB", "accessed MB", "ratio", "of the layer's weights"], table)


if __name__ == "__main__":
    main()
