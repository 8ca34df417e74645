"""FLASH-110M on wiki40b/en, the setting of the official training script.

The paper calls it 110M; at this depth and tokenizer it has 165M parameters, 87M of them outside embedding and head.
As it is, a step holds 128 rows of activations over all devices, as on the official eight GPUs. One device:
--config.train.microbatches=16 --config.model.remat=full, 16 rows in 5 GiB (compiled for a CPU, no accelerator tried).
Rows of the ablation table: --config.model.attention=local_grouped (any name of lin_jax.config.ABLATIONS)
"""

from lin_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    FlashConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
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
            attention=AttentionConfig(local="laplace", group_size=256, convolution=32),
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
        train=TrainConfig(steps=125_000, microbatches=2, evaluate_every=2500, evaluate_batches=100),
        checkpoint=CheckpointConfig(every=2500),
    )
