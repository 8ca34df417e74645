"""A small byte-level FLASH on this Python's own library: a trained model in about five minutes on two CPU cores."""

from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    FlashConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        workdir="runs/quickstart",
        model=FlashConfig(
            vocabulary_size=257,
            width=256,
            depth=6,
            query_key_size=64,
            attention=AugmentedConfig(local="relu2", group_size=64, convolution=32),
        ),
        data=DataConfig(source="stdlib", tokenizer="bytes", sequence_length=512, batch_size=8),
        optimizer=OptimizerConfig(peak_learning_rate=2e-3, schedule="cosine", warmup_steps=30),
        train=TrainConfig(steps=300, evaluate_every=100, evaluate_batches=20),
        checkpoint=CheckpointConfig(every=100),
    )
