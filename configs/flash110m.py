"""FLASH-110M on wiki40b/en, the setting of the official training script.

The paper calls it 110M; at this depth and tokenizer it has 165M parameters, 87M of them outside embedding and head.
As it is, a step holds 128 rows of activations over all devices, as on the official eight GPUs; with `:v5e-8` after the
file's name 64, on eight TPU v5e. One device: --config.train.microbatches=16 --config.model.remat=full, 16 rows in 5 GiB
(compiled for a CPU, no accelerator tried). What a step needs is printed by --config.plan=a100:8 or v5e:2x4, and is in
docs/pods.md.
Rows of the ablation table: --config.model.attention=local_grouped (any name of the presets of lin_jax.attentions)
"""

from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    FlashConfig,
    OptimizerConfig,
    TrainConfig,
    require,
)

MICROBATCHES = {"8xa100": 2, "v5e-8": 4}


def get_config(devices: str = "8xa100") -> Config:
    require(devices in MICROBATCHES, f"unknown devices {devices}; there are {', '.join(MICROBATCHES)}")
    return Config(
        workdir="runs/flash110m",
        model=FlashConfig(
            vocabulary_size=50257,
            width=768,
            depth=24,
            query_key_size=128,
            expansion=2.0,
            norm="scalenorm",
            token_shift=True,
            rotary_size=32,
            attention=AugmentedConfig(local="laplace", group_size=256, convolution=32),
            dtype="bfloat16",
        ),
        data=DataConfig(
            source="tfds",
            tfds_name="wiki40b/en",
            tokenizer="gpt2",
            sequence_length=1024,
            batch_size=256,
        ),
        optimizer=OptimizerConfig(
            peak_learning_rate=7e-4,
            schedule="linear",
            warmup_steps=10_000,
            weight_decay=0.01,
            gradient_clip=0.1,
        ),
        train=TrainConfig(steps=125_000, microbatches=MICROBATCHES[devices], evaluate_every=2500, evaluate_batches=100),
        checkpoint=CheckpointConfig(every=2500),
    )
