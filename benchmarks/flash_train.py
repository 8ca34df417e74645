"""A training step of FLASH (forward, loss, backward, AdamW) against the same model in eager PyTorch; and its memory.

    python -m benchmarks.flash_train [--repeats 10] [--json FILE]
    python -m benchmarks.flash_train --memory

All models start from the same weights and take their steps on the same tokens, in turn, in float32. The program ends
without figures when their losses before the first update differ by more than 1e-4. `torch` convolves as the official
code does, an image with one channel; `torch depthwise` makes every value a channel, which is much quicker on a CPU, so
that it is the opponent that says something about the rest of the model. `--memory` compiles the step at
several lengths and prints what the compiler reserves; it needs no PyTorch.
"""

import argparse
import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from lin_jax.convert.flash import to_official
from lin_jax.experiment import AugmentedConfig, Config, FlashConfig, MeshConfig, OptimizerConfig
from lin_jax.models.registry import create_model
from lin_jax.models.structure import Structure, make_structure
from lin_jax.tasks.language_model import LanguageModelling
from lin_jax.train.optimizer import learning_rate_schedule, make_optimizer
from lin_jax.train.sharding import batch_shardings, make_partition
from lin_jax.train.state import TrainState, abstract_state, initial_state, state_shardings
from lin_jax.train.step import make_train_step

TOLERANCE = 1e-4
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
MEBIBYTE = 2**20
OURS = "lin_jax"
TORCH_MODELS = {"torch": False, "torch depthwise": True}


def model_config(options: argparse.Namespace) -> FlashConfig:
    """The model that the options ask for."""
    return FlashConfig(
        vocabulary_size=options.vocabulary,
        width=options.width,
        depth=options.depth,
        attention=AugmentedConfig(group_size=options.group, convolution=options.taps),
        remat=options.remat,
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """The library's own training step on one device, and what it works on."""

    structure: Structure
    optimizer: optax.GradientTransformation
    shardings: TrainState
    step: Any


def make_program(options: argparse.Namespace) -> Program:
    """Builds the step that `train.py` would run: AdamW without clipping, decay on every parameter, as in PyTorch."""
    config = model_config(options)
    structure = make_structure(lambda rngs: create_model(config, rngs))
    settings = OptimizerConfig(
        peak_learning_rate=LEARNING_RATE, schedule="constant", weight_decay=WEIGHT_DECAY, gradient_clip=0.0
    )
    optimizer = make_optimizer(settings, steps=1, decay=True)
    mesh = make_partition(MeshConfig(), jax.devices()[:1])
    shardings = state_shardings(structure, optimizer, mesh)
    task = LanguageModelling(Config(model=config))  # On one device the sizes of a batch do not matter.
    loss, of_batch = task.loss(structure, mesh), batch_shardings(mesh, task.batch_fields())
    schedule = learning_rate_schedule(settings, steps=1)
    step = make_train_step(loss, optimizer, schedule, 1, shardings, of_batch, mesh)
    return Program(structure, optimizer, shardings, step)


class JaxTrainer:
    """Our model and its optimizer; a call is one step, which returns the loss before it."""

    def __init__(self, program: Program, rows: np.ndarray):
        start = jax.jit(
            lambda seed: initial_state(program.structure, program.optimizer, seed), out_shardings=program.shardings
        )
        self.step, self.state = program.step, start(jnp.uint32(0))
        self.batch = jax.device_put(make_batch(rows))

    def __call__(self) -> float:
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics.loss)


def make_batch(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows [B, T + 1] of one sequence each as the training step takes them."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    ones = np.ones_like(tokens)
    return {"tokens": tokens, "targets": targets, "weights": ones.astype(np.float32), "segment_ids": ones}


class TorchTrainer:
    """The eager PyTorch model and its optimizer; a call is one step, which returns the loss before it."""

    def __init__(self, config: FlashConfig, weights: dict[str, np.ndarray], rows: np.ndarray, depthwise: bool):
        import torch

        self.model = torch_model(config, weights, depthwise)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.rows = torch.from_numpy(rows).long()

    def __call__(self) -> float:
        from torch.nn import functional as F

        logits = self.model(self.rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), self.rows[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def torch_model(config: FlashConfig, weights: dict[str, np.ndarray], depthwise: bool) -> Any:
    """The PyTorch model of the same sizes, with the weights given under their official names."""
    import torch

    from benchmarks.torch_flash import TorchFlash, TorchFlashConfig

    model = TorchFlash(
        TorchFlashConfig(
            vocabulary_size=config.vocabulary_size,
            width=config.width,
            depth=config.depth,
            query_key_size=config.query_key_size,
            value_size=config.value_size,
            group_size=config.attention.group_size,
            kernel=2 * config.attention.convolution - 1,
            rotary_size=config.rotary_size,
            bias_buckets=config.bias_buckets,
            bias_max_distance=config.bias_max_distance,
            depthwise=depthwise,
        )
    )
    # Frequencies are computed from the sizes and not converted; a parameter that is missing is an error.
    trained = dict(model.named_parameters())
    buffers = {name: array for name, array in model.state_dict().items() if name not in trained}
    model.load_state_dict(buffers | {name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
    return model


def make_trainers(options: argparse.Namespace) -> dict[str, Any]:
    """Name -> trainer, from the same weights; PyTorch's only where it is installed."""
    config, program = model_config(options), make_program(options)
    random = np.random.default_rng(0)
    rows = random.integers(0, config.vocabulary_size, (options.batch, options.length + 1), dtype=np.int32)
    trainer = JaxTrainer(program, rows)
    opponents = TORCH_MODELS if common.has_torch() else {}
    model = program.structure.merge(trainer.state.parameters, trainer.state.constants)
    weights = to_official(model, kernel=2 * options.taps - 1) if opponents else {}
    return {OURS: trainer} | {
        name: TorchTrainer(config, weights, rows, depthwise) for name, depthwise in opponents.items()
    }


def check_first_losses(trainers: dict[str, Any]) -> None:
    """Takes the first step of each; ends the program when the losses differ."""
    losses = {name: trainer() for name, trainer in trainers.items()}
    print("loss before the first update: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    difference = max(losses.values()) - min(losses.values())
    if not difference <= TOLERANCE:
        sys.exit(f"the losses differ by {difference:.1e}, more than {TOLERANCE:.0e}: nothing was timed")


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Times the steps in turn, prints and returns the figures."""
    trainers = make_trainers(options)
    check_first_losses(trainers)
    competition = common.Competition()
    timings = common.time_interleaved(trainers, options.repeats)
    print(f"other programs used {common.percent(competition.share())} of the processor meanwhile")
    tokens = options.batch * options.length
    result = {
        name: {
            "median_ms": 1e3 * timing.median,
            "min_ms": 1e3 * timing.minimum,
            "tokens_per_second": tokens / timing.median,
            "lin_jax_is_faster": timings[OURS].speedup_over(timing),
            "lin_jax_is_faster_by_minimum": timings[OURS].best_speedup_over(timing),
            "loss_after": trainers[name](),
        }
        for name, timing in timings.items()
    }
    print_speed(result)
    return result


def print_speed(result: dict[str, Any]) -> None:
    """One row a model."""
    header = ["model", "median ms", "min ms", "tokens/s", "lin_jax is faster", "by minimum", "loss after"]
    cells = [
        [
            name,
            f"{row['median_ms']:.1f}",
            f"{row['min_ms']:.1f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['lin_jax_is_faster']:.2f} x",
            f"{row['lin_jax_is_faster_by_minimum']:.2f} x",
            f"{row['loss_after']:.5f}",
        ]
        for name, row in result.items()
    ]
    common.print_table(header, cells)


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles the step at growing lengths; prints and returns the bytes that the compiler reserves."""
    program = make_program(options)
    state = abstract_state(program.structure, program.optimizer, program.shardings)
    result = {}
    for length in options.memory_lengths:
        batch = make_batch(np.zeros((options.batch, length + 1), np.int32))
        analysis = program.step.lower(state, batch).compile().memory_analysis()
        fixed = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        result[str(length)] = {"temporary": analysis.temp_size_in_bytes, "peak": fixed + analysis.temp_size_in_bytes}
    print_memory(result, options.batch)
    return result


def print_memory(result: dict[str, Any], batch: int) -> None:
    """One row a length, with the factor to the row before."""
    cells, previous = [], None
    for length, row in result.items():
        factor = f"{row['temporary'] / previous['temporary']:.2f} x" if previous else ""
        per_token = row["temporary"] / (batch * int(length)) / 1024
        cells.append(
            [length, f"{row['temporary'] / MEBIBYTE:.1f}", factor, f"{per_token:.1f}", f"{row['peak'] / MEBIBYTE:.1f}"]
        )
        previous = row
    print("memory of a training step; peak is temporary plus parameters, optimizer state and tokens")
    common.print_table(["T", "temporary MiB", "growth", "KiB/token", "peak MiB"], cells)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="memory over length instead of speed")
    parser.add_argument("--memory-lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--length", type=int, default=1024, help="tokens T")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=257)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--group", type=int, default=256)
    parser.add_argument("--taps", type=int, default=32)
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="none")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", help="file for the result")
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    options = parse_options()
    facts = common.describe_machine()
    common.print_machine(facts)
    result = measure_memory(options) if options.memory else measure_speed(options)
    common.write_json(options.json, {"machine": facts, "options": vars(options), "result": result})


if __name__ == "__main__":
    main()
