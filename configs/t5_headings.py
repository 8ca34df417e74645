"""A small T5 from scratch that writes the heading of a section from its text; minutes on a CPU.

    python -m benchmarks.headings --data DIR --pairs data/headings
    python train.py --config configs/t5_headings.py
    python train.py --config configs/t5_headings.py:augmented
    python eval.py --task summarize --checkpoint runs/t5_headings/augmented --beams 4

The first command makes pairs of DIR/wiki.train.tokens and so on (WikiText); any JSON Lines with "text" and "heading"
do. The word behind the colon is the attention of encoder, decoder and source alike; without it, softmax.
"""

from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    Seq2seqFinetuneConfig,
    SoftmaxConfig,
    T5Config,
    TrainConfig,
    require,
)


def get_config(variant: str = "softmax") -> Config:
    kinds = {"softmax": SoftmaxConfig, "augmented": lambda **own: AugmentedConfig(group_size=32, convolution=9, **own)}
    require(variant in kinds, f"unknown {variant}; there are {', '.join(kinds)}")
    make = kinds[variant]
    return Config(
        workdir=f"runs/t5_headings/{variant}",
        model=T5Config(
            vocabulary_size=4096,
            width=128,
            depth=2,
            encoder_depth=3,
            heads=4,
            head_size=32,
            feed_forward_size=512,
            attention=make(),
            encoder_attention=make(causal=False),
            cross_attention=make(causal=False),
        ),
        data=DataConfig(
            source="table",
            path=("data/headings/train.jsonl",),
            validation_path=("data/headings/valid.jsonl",),
            target_field="heading",
            tokenizer="train",
            tokenizer_vocabulary=4096,
            sequence_length=192,
            target_length=16,
            batch_size=32,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=1e-3, schedule="cosine", warmup_steps=100),
        train=TrainConfig(epochs=12.0, evaluate_every=500, evaluate_batches=0, log_every=50),
        finetune=Seq2seqFinetuneConfig(generated_examples=200),
        checkpoint=CheckpointConfig(every=250),
    )
