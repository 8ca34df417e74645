"""Compiles augmented attention for TPUs and GPUs that are not here, and prints the temporary memory of each program.

python -m benchmarks.aot
python -m benchmarks.aot --targets v5e --shapes flash110m-1024 --implementations pallas_tpu xla
python -m benchmarks.aot --targets a100 h100 --implementations pallas_gpu xla

Needs libtpu (`pip install 'lin_jax[tpu]'`), and no TPU; for GPUs jax-cuda12-plugin and jax-cuda12-pjrt of JAX's version
(`pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt`), and neither CUDA's libraries nor a GPU. One target a
process: a second one would be compiled for the first. Nothing is run.

The arrays are as projections give them, [B, T, H D]: of four axes, [B, T, H, D], a TPU keeps heads in tiles, and an
argument or result of a program in that form is copied.
"""

import argparse
import dataclasses
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.common import write_json
from lin_jax.experiment import Config, DataConfig, FlashConfig, LlamaConfig, MeshConfig
from lin_jax.ops.linear_attention import augmented_attention
from lin_jax.ops.linear_attention.gpu import blocks as gpu_plan
from lin_jax.ops.linear_attention.tpu import kernel as pallas_tpu
from lin_jax.ops.linear_attention.tpu.blocks import make_plan
from lin_jax.plan import target as targets
from lin_jax.train import sharding
from lin_jax.train.parts import abstract_batch, make_parts, make_step
from lin_jax.train.state import abstract_state

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
GPUS = {"a100": "a100:1", "h100": "h100:1"}
# The plan (see `lin_jax.plan`) of each.
TARGETS = TPUS | GPUS
DIRECTIONS = ("forward", "backward")


def prepare(name: str) -> None:
    """Tells libtpu or JAX's CUDA plugin of the target; before JAX starts its backends."""
    targets.prepare(targets.parse(TARGETS[name]))


def devices(name: str) -> Any:
    """Devices of the target, to compile for."""
    return targets.devices(targets.parse(TARGETS[name]))


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and types of the arrays [B, T, heads, size] and the options of a call."""

    shapes: dict[str, jax.ShapeDtypeStruct]
    options: dict[str, Any]

    def tokens(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays with heads and sizes as one axis."""
        flat = lambda x: jax.ShapeDtypeStruct((*x.shape[:2], x.shape[2] * x.shape[3]), x.dtype)  # noqa: E731
        return {name: flat(x) if len(x.shape) == 4 else x for name, x in self.shapes.items()}

    def call(self, flat: dict[str, Any], implementation: str) -> jax.Array:
        """The op, of arrays as `tokens` has them."""
        arrays = {name: x.reshape(self.shapes[name].shape) for name, x in flat.items()}
        y = augmented_attention(**arrays, **self.options, implementation=implementation)
        return y.reshape(*y.shape[:2], -1)

    def bytes_of(self, *names: str) -> int:
        """Bytes of some arrays, and of y."""
        size = lambda x: int(np.prod(x.shape)) * x.dtype.itemsize  # noqa: E731
        q, v = self.shapes["q_BTHD"], self.shapes["v_BTKE"]
        y = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), v.dtype)
        return sum(size(y if name == "y" else self.shapes[name]) for name in names if name in {**self.shapes, "y": y})


def llama2_7b(T: int, B: int = 1, **changes: Any) -> Case:
    """LLaMA-2-7B's attention, one layer."""
    return make(B, T, 32, 32, 128, 128, taps=32, **{"local": "relu2", "group_size": 64, **changes})


def flash110m(T: int, B: int = 1, **changes: Any) -> Case:
    """FLASH-110M's attention, one layer: with own queries and keys of the grouped branch, and a bias."""
    options = {"local": "laplace", "group_size": 256, "score_scale": 1 / 256, **changes}
    return make(B, T, 1, 1, 128, 1536, taps=32, own_grouped=True, bias=True, **options)


def make(
    B: int, T: int, H: int, K: int, D: int, E: int, taps: int, own_grouped=False, bias=False, segments=False, **options
) -> Case:
    """A case in bfloat16."""
    tokens = lambda heads, size: jax.ShapeDtypeStruct((B, T, heads, size), jnp.bfloat16)  # noqa: E731
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    shapes = {"q_BTHD": tokens(H, D), "k_BTKD": tokens(K, D), "v_BTKE": tokens(K, E), "alpha": float32(H)}
    if taps:
        shapes["conv_WH"] = float32(taps, H)
    if own_grouped:
        shapes |= {"grouped_q_BTHP": tokens(H, D), "grouped_k_BTKP": tokens(K, D)}
    if bias:
        shapes["bias_XH"] = float32(options["group_size"] * options.get("local_groups", 1), H)
    if segments:
        shapes["segment_ids_BT"] = jax.ShapeDtypeStruct((B, T), jnp.int32)
    return Case(shapes, options)


SHAPES: dict[str, Callable[[], Case]] = {
    "llama2_7b-4096": lambda: llama2_7b(4096),
    "llama2_7b-32768": lambda: llama2_7b(32768),
    "flash110m-1024": lambda: flash110m(1024),
    "flash110m-8192": lambda: flash110m(8192),
}


def compile_case(case: Case, implementation: str, direction: str, device: Any) -> Any:
    """The compiled program of the op, or of its gradients, for one device."""
    mesh = Mesh(np.array([device]), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    arrays = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in case.tokens().items()}

    def forward(arrays):
        return case.call(arrays, implementation)

    def backward(arrays, cotangent):
        floats = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        _, pull = jax.vjp(lambda floats: case.call({**arrays, **floats}, implementation), floats)
        return pull(cotangent)[0]

    with jax.set_mesh(mesh):
        if direction == "forward":
            traced = jax.jit(forward).trace(arrays)
        else:
            q, v = case.shapes["q_BTHD"], case.shapes["v_BTKE"]
            y = jax.ShapeDtypeStruct((*q.shape[:2], q.shape[2] * v.shape[3]), v.dtype, sharding=place)
            traced = jax.jit(backward).trace(arrays, y)
        platform = "cuda" if device.platform == "gpu" else device.platform
        return traced.lower(lowering_platforms=(platform,)).compile()


def yardstick(case: Case, direction: str) -> int:
    """What temporary memory is compared with: q, k, v and y, or q, k, v and their gradients."""
    inputs = ("q_BTHD", "k_BTKD", "v_BTKE", "grouped_q_BTHP", "grouped_k_BTKP")
    return case.bytes_of(*inputs, "y") if direction == "forward" else 2 * case.bytes_of(*inputs)


def measure(target: str, names: list[str], implementations: list[str], directions: list[str]) -> list[dict[str, Any]]:
    """Compiles every combination for one target."""
    device, rows = devices(target)[0], []
    for name in names:
        for direction in directions:
            for implementation in implementations:
                case, start = SHAPES[name](), time.perf_counter()
                row: dict[str, Any] = {"target": target, "shape": name, "direction": direction}
                row |= {"implementation": implementation, "yardstick": yardstick(case, direction)}
                try:
                    memory = compile_case(case, implementation, direction, device).memory_analysis()
                    row["temporary"] = memory.temp_size_in_bytes
                except Exception as error:  # what the compiler refuses is a result
                    row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                rows.append({**row, "seconds": time.perf_counter() - start})
                print_rows(rows[-1:], header=len(rows) == 1)
    return rows


def print_rows(rows: list[dict[str, Any]], header: bool) -> None:
    """Prints the rows in fixed columns, as they come."""
    layout = "{:<7} {:<16} {:<9} {:<11} {:>13} {:>11} {:>8}"
    if header:
        print(layout.format("target", "shape", "direction", "form", "temporary MB", "of in+out", "seconds"))
    for row in rows:
        names = (row["target"], row["shape"], row["direction"], row["implementation"])
        if "error" in row:
            print(*names, row["error"], flush=True)
            continue
        share = f"{row['temporary'] / row['yardstick']:.1%}"
        print(layout.format(*names, f"{row['temporary'] / 1e6:.2f}", share, f"{row['seconds']:.0f}"), flush=True)


def check(target: str) -> None:
    """Compiles small shapes, and blocks that the compiler must refuse, and prints what came out."""
    device = devices(target)[0]
    if target in GPUS:
        return check_gpu(device)
    small = llama2_7b(300)
    narrow, wide = make(1, 64, 2, 2, 64, 64, taps=4, local="relu2", group_size=16), flash110m(1024)

    def attempt(name: str, case: Case, direction: str, **illegal: Any) -> None:
        def plan(*arguments: Any) -> Any:
            return dataclasses.replace(make_plan(*arguments), **illegal)

        try:
            with mock.patch.object(pallas_tpu, "make_plan", plan):
                compile_case(case, "pallas_tpu", direction, device)
            print(f"{name}: compiled")
        except Exception as error:
            print(f"{name}: {' '.join(str(error).split())[:1000]}")

    for direction in DIRECTIONS:
        attempt(direction, small, direction)
    attempt("half a tile of lanes", narrow, "forward", heads=1)
    attempt("more memory than it may use", wide, "forward", vmem_bytes=4 << 20)


def check_gpu(device: Any) -> None:
    """The same for a GPU: small shapes, and blocks that do not fit into its shared memory."""
    small, sizes = llama2_7b(300), gpu_plan.tuning

    def attempt(name: str, direction: str, **illegal: Any) -> None:
        def tuning(*arguments: Any) -> Any:
            return dataclasses.replace(sizes(*arguments), **illegal)

        try:
            with mock.patch.object(gpu_plan, "tuning", tuning):
                compile_case(small, "pallas_gpu", direction, device)
            print(f"{name}: compiled")
        except Exception as error:
            print(f"{name}: {' '.join(str(error).split())[:1000]}")

    for direction in DIRECTIONS:
        attempt(direction, direction)
    attempt("more memory than it may use", "forward", rows=512)


TINY: dict[str, Any] = {
    "flash": FlashConfig(vocabulary_size=256, width=256, depth=2, remat="full", dtype="bfloat16"),
    "llama": LlamaConfig(
        vocabulary_size=256,
        width=512,
        depth=2,
        heads=4,
        key_value_heads=2,
        feed_forward_size=512,
        remat="full",
        dtype="bfloat16",
    ),
}


def train_step(name: str, implementation: str, target: str) -> Any:
    """The compiled training step of a small model over four devices of the target."""
    model = TINY[name]
    attention = dataclasses.replace(model.attention, implementation=implementation)
    config = Config(
        model=dataclasses.replace(model, attention=attention),
        data=DataConfig(batch_size=8, sequence_length=1024),
        mesh=MeshConfig(data=2, fsdp=2),
    )
    parts = make_parts(config, sharding.make_partition(config.mesh, devices(target)[:4]))
    state = abstract_state(parts.structure, parts.optimizer, parts.shardings)
    return make_step(parts).trace(state, abstract_batch(parts)).lower(lowering_platforms=("tpu",)).compile()


def measure_training(target: str, implementations: list[str]) -> None:
    """Compiles both models' steps, and prints what they need and how often they call the kernel's passes."""
    for name, implementation in itertools.product(TINY, implementations):
        start = time.perf_counter()
        try:
            compiled = train_step(name, implementation, target)
            text, memory = compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes
            calls = {each: text.count(f"%augmented_attention_{each}") > 0 for each in ("forward", "queries", "keys")}
            found = f"{memory / 1e6:.2f} MB a device, kernels {[each for each, there in calls.items() if there]}"
        except Exception as error:
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(
            f"{target} {name} data 2, fsdp 2 {implementation}: {found}, {time.perf_counter() - start:.0f} s", flush=True
        )


def main() -> None:
    """One target in this process, several in one process each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TPUS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--implementations", nargs="+", default=["pallas_tpu", "xla"])
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--check", action="store_true", help="small shapes and illegal blocks instead, one target only")
    parser.add_argument("--train", action="store_true", help="training steps of small models instead")
    parser.add_argument("--json", help="file for the result, one target only")
    options = parser.parse_args()
    if len(options.targets) == 1:
        prepare(options.targets[0])
        if options.check:
            return check(options.targets[0])
        if options.train:
            return measure_training(options.targets[0], options.implementations)
        rows = measure(options.targets[0], options.shapes, options.implementations, options.directions)
        write_json(options.json, {"rows": rows})
        return
    for target in options.targets:
        chosen = ["--shapes", *options.shapes, "--implementations", *options.implementations]
        command = [sys.executable, "-m", "benchmarks.aot", "--targets", target, *chosen]
        command += ["--train"] * options.train
        subprocess.run([*command, "--directions", *options.directions], check=True)


if __name__ == "__main__":
    main()
