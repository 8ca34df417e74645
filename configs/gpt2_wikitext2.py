"""GPT-2 on WikiText-2 with linearized attention.

The 124M model, from Hugging Face's checkpoint:

    python convert_weights.py --input gpt2 --output runs/gpt2/original
    python train.py --config configs/gpt2_wikitext2.py

`configs/gpt2_wikitext2.py:scratch` trains the same architecture from random parameters, and `:small` a reduced one with
a vocabulary of its own, in minutes on a CPU. Files elsewhere: --config.data.path=FILE
--config.data.validation_path=FILE
"""

from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    FinetuneConfig,
    Gpt2Config,
    OptimizerConfig,
    TrainConfig,
    require,
)

ATTENTION = AugmentedConfig(local="softmax", group_size=64, local_groups=2)
FULL = Gpt2Config(attention=ATTENTION)
SMALL = Gpt2Config(
    vocabulary_size=4096, width=128, depth=4, heads=4, feed_forward_size=512, positions=512, attention=ATTENTION
)
TOKENIZERS = {"finetune": "checkpoint", "scratch": "gpt2", "small": "train"}


def get_config(variant: str = "finetune") -> Config:
    require(variant in TOKENIZERS, f"unknown {variant}; there are {', '.join(TOKENIZERS)}")
    small, finetune = variant == "small", variant == "finetune"
    return Config(
        workdir=f"runs/gpt2/{variant}",
        model=SMALL if small else FULL,
        data=DataConfig(
            source="text",
            path=("data/wikitext2/wiki.train.tokens",),
            validation_path=("data/wikitext2/wiki.valid.tokens",),
            tokenizer=TOKENIZERS[variant],
            tokenizer_vocabulary=SMALL.vocabulary_size,
            sequence_length=256 if small else 1024,
            batch_size=8,
        ),
        optimizer=OptimizerConfig(
            peak_learning_rate=2e-3 if small else 5e-5 if finetune else 6e-4, schedule="cosine", warmup_steps=20
        ),
        train=TrainConfig(steps=500, evaluate_every=250, evaluate_batches=0 if small else 50),
        finetune=FinetuneConfig(checkpoint="runs/gpt2/original" if finetune else ""),
        checkpoint=CheckpointConfig(every=250),
    )
