"""The paper's ablations at a size for one CPU: 300 steps of a small FLASH on WikiText-2.

One row of the table each: --config.model.attention=NAME --config.workdir=runs/wikitext2/NAME, with a name of
the presets of lin_jax.attentions. Files elsewhere: --config.data.path=FILE --config.data.validation_path=FILE
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
        workdir="runs/wikitext2/augmented",
        model=FlashConfig(
            vocabulary_size=4096,
            width=256,
            depth=4,
            query_key_size=64,
            attention=AugmentedConfig(local="laplace", group_size=64),
        ),
        data=DataConfig(
            source="text",
            path=("data/wikitext2/wiki.train.tokens",),
            validation_path=("data/wikitext2/wiki.valid.tokens",),
            tokenizer="train",
            tokenizer_vocabulary=4096,
            sequence_length=512,
            batch_size=4,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=2e-3, schedule="linear", warmup_steps=30),
        train=TrainConfig(steps=300, evaluate_every=0, evaluate_batches=0),
        checkpoint=CheckpointConfig(every=0),
    )
