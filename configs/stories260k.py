"""A trained LLaMA of 260 thousand parameters, linearized and finetuned on TinyStories: all of it in minutes on a CPU.

The model is llama2.c's stories260K in Hugging Face's form; convert it first, and split the stories:

    python convert_weights.py --input stories260k_hf --output runs/stories260k/original
    python -m benchmarks.linearize --split tinystories_sample.txt --output data/tinystories

Then `python train.py --config configs/stories260k.py`. `configs/stories260k.py:transfer` is a first stage, in which the
new attention learns what the old one gives; go on from it with
--config.finetune.checkpoint=runs/stories260k/transfer.
"""

from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    FinetuneConfig,
    LlamaConfig,
    OptimizerConfig,
    TrainConfig,
    TransferFinetuneConfig,
    require,
)


def get_config(stage: str = "finetune") -> Config:
    require(stage in ("finetune", "transfer"), f"unknown {stage}; there are finetune, transfer")
    transfer, original = stage == "transfer", "runs/stories260k/original"
    return Config(
        workdir=f"runs/stories260k/{stage}",
        model=LlamaConfig(
            vocabulary_size=512,
            width=64,
            depth=5,
            heads=8,
            key_value_heads=4,
            head_size=8,
            feed_forward_size=172,
            positions=512,
            tie_embeddings=True,
            attention=AugmentedConfig(local="softmax", group_size=64, local_groups=2),
        ),
        data=DataConfig(
            source="text",
            path=("data/tinystories/train.txt",),
            validation_path=("data/tinystories/valid.txt",),
            separator="<|endoftext|>",
            tokenizer="checkpoint",
            sequence_length=512,
            batch_size=8,
        ),
        optimizer=OptimizerConfig(
            peak_learning_rate=1e-2 if transfer else 2e-3, schedule="cosine", warmup_steps=20, weight_decay=0.0
        ),
        train=TrainConfig(steps=300, evaluate_every=100, evaluate_batches=0),
        finetune=TransferFinetuneConfig(checkpoint=original, train=("attention",))
        if transfer
        else FinetuneConfig(checkpoint=original),
        checkpoint=CheckpointConfig(every=0),
    )
