"""Parallel training on virtual CPU devices: the same losses on every mesh, and what rows cut over devices cost.

python -m benchmarks.parallel --losses     # 20 steps of small models on every mesh
python -m benchmarks.parallel --bytes      # bytes sent for rows of 8k and of 512k tokens over 8 devices
python -m benchmarks.parallel --memory     # a row of a million tokens, forward and backward, over 8 devices
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lin_jax.experiment import (
    AugmentedConfig,
    Config,
    DataConfig,
    FlashConfig,
    Gpt2Config,
    LlamaConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from lin_jax.train import sharding
from lin_jax.train.collectives import find_collectives, sent_bytes
from lin_jax.train.parts import Parts, abstract_batch, make_parts, make_step
from lin_jax.train.state import TrainState, abstract_state, initial_state

VOCABULARY = 64
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "tensor 2 x fsdp 4": MeshConfig(data=1, tensor=2, fsdp=4),
    "data 2 x sequence 4": MeshConfig(data=2, sequence=4),
    "data 2 x sequence 2 x tensor 2": MeshConfig(data=2, sequence=2, tensor=2),
}
ARCHITECTURES = ("flash", "llama", "gpt2")
KINDS = ("augmented", "softmax")


def small_model(architecture: str, kind: str, positions: int = 64, **attention: Any) -> ModelConfig:
    """A model that compiles quickly and has everything that meshes cut; LLaMA with grouped queries."""
    augmented = kind == "augmented"
    options = {"group_size": 8, "convolution": 6 if augmented else 0, "local": "relu2", **attention}
    mixing = AugmentedConfig(kind=kind, **options)
    shared: dict[str, Any] = {"vocabulary_size": VOCABULARY, "width": 32, "depth": 2, "attention": mixing}
    if architecture == "flash":
        return FlashConfig(query_key_size=16, rotary_size=8, **shared)
    if architecture == "gpt2":
        return Gpt2Config(heads=4, feed_forward_size=64, positions=positions, **shared)
    return LlamaConfig(heads=8, key_value_heads=4, head_size=8, feed_forward_size=48, positions=positions, **shared)


def parts_of(model: ModelConfig, mesh: MeshConfig, devices: int, rows: int, length: int, segments: bool) -> Parts:
    """A run on some of the devices."""
    config = Config(
        model=model,
        data=DataConfig(sequence_length=length, batch_size=rows, packing="segments" if segments else "concatenate"),
        optimizer=OptimizerConfig(peak_learning_rate=3e-3, schedule="constant", gradient_clip=0.0),
        train=TrainConfig(loss_chunk=max(16, length // 128)),
        mesh=mesh,
    )
    partition = sharding.make_partition(mesh, jax.devices()[:devices])
    sharding.check_fit(config, partition)
    return make_parts(config, partition)


def start(parts: Parts) -> TrainState:
    """The state before the first step, with what linearized attention adds turned on."""
    flat = nnx.traversals.flatten_mapping(jax.eval_shape(parts.structure.initialise, jnp.uint32(0))[0])
    on = {path: 0.1 * jnp.ones(leaf.shape) for path, leaf in flat.items() if path[-1] in ("alpha", "filter")}
    known = {".".join(path): array for path, array in on.items()}
    make = jax.jit(lambda known: initial_state(parts.structure, parts.optimizer, jnp.uint32(0), known))
    return jax.device_put(make(known), parts.shardings)


def make_batch(rows: int, length: int, segments: bool, seed: int) -> dict[str, np.ndarray]:
    """Random tokens, in rows of several documents and padding if `segments`."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCABULARY, (rows, length + 1), dtype=np.int32)
    ids = np.ones((rows, length), np.int32)
    for row in ids if segments else ():
        ends = np.sort(random.choice(np.arange(1, length), 3, replace=False))
        row[:] = 1 + np.searchsorted(ends, np.arange(length), side="right")
        row[(ends[-1] + length) // 2 :] = 0
    weights = (ids != 0).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ids, "weights": weights}


@dataclasses.dataclass(frozen=True)
class Course:
    """What a run gave: losses, the first gradient, the last parameters."""

    losses: np.ndarray
    gradient: Any
    parameters: Any


def follow(
    model: ModelConfig, mesh: MeshConfig, devices: int, steps: int, segments: bool = True, length: int = 64
) -> Course:
    """Some steps of training."""
    parts = parts_of(model, mesh, devices, 8, length, segments)
    state, step, losses, gradient = start(parts), make_step(parts), [], None
    for seed in range(steps):
        batch = jax.device_put(make_batch(8, length, segments, seed), sharding.batch_sharding(parts.partition))
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
        if gradient is None:  # Adam's first mean is a tenth of it.
            gradient = jax.device_get(optax.tree_utils.tree_get(state.optimizer, "mu"))
    return Course(np.array(losses), gradient, jax.device_get(state.parameters))


def first_gradient(model: ModelConfig, mesh: MeshConfig, devices: int) -> tuple[float, Any]:
    """The loss of a batch and its gradient, without an optimizer."""
    parts = parts_of(model, mesh, devices, 8, 64, segments=True)
    loss = parts.task.loss(parts.structure, parts.partition)

    def mean(parameters: Any, constants: Any, batch: Any) -> jax.Array:
        sums = loss(parameters, {}, constants, batch, None)
        return sums.loss / sums.weight

    state = start(parts)
    batch = jax.device_put(make_batch(8, 64, True, 0), sharding.batch_sharding(parts.partition))
    value, gradient = jax.jit(jax.value_and_grad(mean))(state.parameters, state.constants, batch)
    return float(value), jax.device_get(gradient)


def difference(found: Any, expected: Any) -> float:
    """The largest difference of two trees of arrays, relative to the largest entry of each array."""
    relative = lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)  # noqa: E731
    return float(max(jax.tree.leaves(jax.tree.map(relative, found, expected))))


def print_losses(steps: int, architectures: Sequence[str]) -> None:
    """The largest differences from one device over all steps."""
    print(f"{steps} steps, rows of several documents; differences from one device, relative\n")
    print("| model | attention | mesh | losses | first gradient | last parameters |\n|---|---|---|---|---|---|")
    for architecture in architectures:
        for kind in KINDS:
            model = small_model(architecture, kind)
            one = follow(model, MeshConfig(data=1), 1, steps)
            for name, mesh in MESHES.items():
                found = follow(model, mesh, 8, steps)
                told = (
                    difference(found.losses / one.losses, np.ones(steps)),
                    difference(found.gradient, one.gradient),
                    difference(found.parameters, one.parameters),
                )
                print(
                    f"| {architecture} | {kind} | {name} | " + " | ".join(f"{x:.1e}" for x in told) + " |", flush=True
                )


def compile_step(parts: Parts) -> Any:
    """The compiled update, without any numbers."""
    state = abstract_state(parts.structure, parts.optimizer, parts.shardings)
    return make_step(parts).lower(state, abstract_batch(parts)).compile()


def layer_bytes(parts: Parts, text: str) -> dict[str, int]:
    """Bytes that a device sends for one layer, forward and backward, gradients of its parameters included."""
    depth = parts.config.model.depth
    return sent_bytes([c._replace(times=c.times // depth) for c in find_collectives(text) if c.times % depth == 0])


def print_bytes(lengths: tuple[int, int] = (8192, 524288)) -> None:
    """Bytes sent over 8 devices that share rows, for two lengths."""
    print("rows over 8 devices, G 64, W 32, float32; bytes that a device sends for one layer\n")
    print("| model | R | documents | T | collective-permute | all kinds | whole step |\n|---|---|---|---|---|---|---|")
    cases = [("llama", 1, False), ("llama", 2, False), ("llama", 2, True), ("gpt2", 1, False), ("flash", 1, False)]
    for architecture, groups, segments in cases:
        options = {"group_size": 64, "local_groups": groups, "convolution": 32}
        model = small_model(architecture, "augmented", positions=max(lengths), **options)
        model = dataclasses.replace(model, depth=3, remat="full")
        for length in lengths:
            parts = parts_of(model, MeshConfig(data=1, sequence=8), 8, 1, length, segments)
            text = compile_step(parts).as_text()
            layer, whole = layer_bytes(parts, text), sent_bytes(find_collectives(text))
            told = (layer["collective-permute"], sum(layer.values()), sum(whole.values()))
            case = (architecture, groups, "several" if segments else "one", f"{length:,}")
            print(f"| {' | '.join(map(str, case))} | {' | '.join(f'{x:,}' for x in told)} |", flush=True)


def print_memory(length: int) -> None:
    """A long row on one device and on 8: temporaries, and the loss of a step on 8."""
    model = small_model("llama", "augmented", group_size=64, convolution=32)
    model = dataclasses.replace(model, width=16, heads=2, key_value_heads=1, feed_forward_size=32, remat="full")
    temporaries = {}
    for devices, mesh in ((1, MeshConfig(data=1)), (8, MeshConfig(data=1, sequence=8))):
        parts = parts_of(model, mesh, devices, 1, length, False)
        compiled = compile_step(parts)
        temporaries[devices] = compiled.memory_analysis().temp_size_in_bytes
        print(f"{devices} devices: {temporaries[devices]:,} bytes of temporaries on each", flush=True)
    print(f"ratio {temporaries[1] / temporaries[8]:.2f}")
    batch = jax.device_put(make_batch(1, length, False, 0), sharding.batch_sharding(parts.partition))
    begin = time.perf_counter()
    _, metrics = compiled(start(parts), batch)
    print(
        f"T {length:,} on 8 devices: loss {float(metrics.loss):.6f}, gradient norm {float(metrics.gradient_norm):.6f}, "
    )
    print(f"{time.perf_counter() - begin:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", action="store_true", help="compare the losses on all meshes")
    parser.add_argument("--bytes", action="store_true", help="count what rows cut over devices send")
    parser.add_argument("--memory", action="store_true", help="train on one row of a million tokens")
    parser.add_argument("--steps", type=int, default=20, help="steps of --losses")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, help="models of --losses")
    parser.add_argument("--quick", action="store_true", help="compile with little optimisation")
    parser.add_argument("--length", type=int, default=2**20, help="tokens of --memory")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", arguments.quick)
    print(f"jax {jax.__version__}, 8 virtual CPU devices{', little optimisation' if arguments.quick else ''}")
    if arguments.losses:
        print_losses(arguments.steps, arguments.architectures)
    if arguments.bytes:
        print_bytes()
    if arguments.memory:
        print_memory(arguments.length)


if __name__ == "__main__":
    main()
