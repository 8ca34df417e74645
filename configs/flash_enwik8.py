"""FLASH on the bytes of enwik8, the first 100 MB of an English Wikipedia dump.

The usual split is 90, 5 and 5 MB; with the file `enwik8` in `data/enwik8/`:

    head -c 90000000 enwik8 > train.txt
    tail -c 10000000 enwik8 | head -c 5000000 > valid.txt
    tail -c 5000000 enwik8 > test.txt

Files elsewhere: --config.data.path=FILE --config.data.validation_path=FILE
"""

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
        workdir="runs/flash_enwik8",
        model=FlashConfig(
            vocabulary_size=257,
            width=512,
            depth=12,
            attention=AugmentedConfig(local="laplace", group_size=256),
            dtype="bfloat16",
        ),
        data=DataConfig(
            source="text",
            path=("data/enwik8/train.txt",),
            validation_path=("data/enwik8/valid.txt",),
            encoding_errors="replace",  # the split cuts a character
            tokenizer="bytes",
            sequence_length=1024,
            batch_size=32,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=5e-4, schedule="cosine", warmup_steps=2000, gradient_clip=0.5),
        train=TrainConfig(steps=100_000, log_every=50, evaluate_every=2500, evaluate_batches=100),
        checkpoint=CheckpointConfig(every=2500),
    )
