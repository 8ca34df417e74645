"""LLaMA-2-7B linearized and finetuned with LoRA, in the paper's setting.

Convert the checkpoint first:

    python convert_weights.py --input meta-llama/Llama-2-7b-hf --output runs/llama2_7b/original

and give documents with --config.data.path (the official code trains on the sample of RedPajama, documents under 50,000
characters). `configs/llama2_7b_lora.py:8192` has rows of 8,192 tokens and rotary positions stretched twofold. What it
needs on each of 8 devices: --config.plan=cpu:8
"""

from lin_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    FinetuneConfig,
    LlamaConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    RopeConfig,
    TrainConfig,
)


def get_config(sequence_length: str = "4096") -> Config:
    length = int(sequence_length)
    return Config(
        workdir=f"runs/llama2_7b/lora_{length}",
        model=LlamaConfig(
            attention=AttentionConfig(local="relu2", group_size=64, convolution=32),
            rope=RopeConfig(scaling="linear", factor=length / 4096) if length > 4096 else RopeConfig(),
            dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(
            source="text",
            path=("data/redpajama_sample/*.jsonl",),
            tokenizer="checkpoint",
            sequence_length=length,
            batch_size=64,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=2e-5, schedule="constant", warmup_steps=20, weight_decay=0.0),
        train=TrainConfig(steps=1000, microbatches=8, evaluate_every=100),
        finetune=FinetuneConfig(
            checkpoint="runs/llama2_7b/original",
            train=("new", "norm", "embedding"),
            lora=LoraConfig(rank=8, alpha=16),
            frozen_dtype="bfloat16",
        ),
        checkpoint=CheckpointConfig(every=100),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
