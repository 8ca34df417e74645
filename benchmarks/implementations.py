"""Small models trained by every implementation of augmented attention: the losses, and how far they are apart.

python -m benchmarks.implementations
python -m benchmarks.implementations --models llama --implementations xla pallas_tpu
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import describe_machine, print_machine, print_table
from lin_jax.experiment import (
    AugmentedConfig,
    Config,
    DataConfig,
    FlashConfig,
    LlamaConfig,
    OptimizerConfig,
    TrainConfig,
)
from lin_jax.train.parts import make_parts, make_step
from lin_jax.train.sharding import make_partition
from lin_jax.train.state import initial_state

STEPS, ROWS, LENGTH, VOCABULARY = 20, 2, 16, 32
ATTENTION = AugmentedConfig(group_size=4, convolution=6)
MODELS = {
    "flash": FlashConfig(
        vocabulary_size=VOCABULARY,
        width=16,
        depth=1,
        query_key_size=8,
        rotary_size=4,
        attention=dataclasses.replace(ATTENTION, local="laplace"),
    ),
    "llama": LlamaConfig(
        vocabulary_size=VOCABULARY,
        width=16,
        depth=1,
        heads=2,
        key_value_heads=1,
        head_size=4,
        feed_forward_size=24,
        attention=dataclasses.replace(ATTENTION, local_groups=2),
    ),
}


def batch(seed):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCABULARY, (ROWS, LENGTH), dtype=np.int32)
    segments = np.cumsum(random.random((ROWS, LENGTH)) < 0.1, axis=1) + 1
    weights = np.ones((ROWS, LENGTH), np.float32)
    return {"tokens": tokens, "targets": tokens // 2, "segment_ids": segments.astype(np.int32), "weights": weights}


def losses(name, implementation):
    model = MODELS[name]
    attention = dataclasses.replace(model.attention, implementation=implementation)
    config = Config(
        model=dataclasses.replace(model, attention=attention),
        data=DataConfig(batch_size=ROWS, sequence_length=LENGTH, packing="segments"),
        optimizer=OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=2),
        train=TrainConfig(steps=STEPS),
    )
    parts = make_parts(config, make_partition(config.mesh, jax.devices()[:1]))
    state = jax.jit(lambda seed: initial_state(parts.structure, parts.optimizer, seed))(jnp.uint32(0))
    step, found = make_step(parts), []
    for seed in range(STEPS):
        state, metrics = step(state, batch(seed))
        found.append(float(metrics.loss))
    return found


def main() -> None:
    """Trains, and compares with the first implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--implementations", nargs="+", default=["xla", "pallas_tpu", "pallas_gpu"])
    options = parser.parse_args()
    print_machine(describe_machine())
    rows = []
    for name in options.models:
        found = {implementation: losses(name, implementation) for implementation in options.implementations}
        first = np.asarray(found[options.implementations[0]])
        for implementation, values in found.items():
            apart = np.max(np.abs(np.asarray(values) - first) / first)
            rows.append([f"{name} {implementation}", f"{values[0]:.6f}", f"{values[-1]:.6f}", f"{apart:.1e}"])
    print_table([f"{STEPS} steps", "first loss", "last loss", "largest relative difference"], rows)


if __name__ == "__main__":
    main()
