"""Medusa heads for LLaMA-2-7B, linearized and finetuned; the model is frozen (Medusa-1).

Finetune the model first (`configs/llama2.py:7b,lora`), and let it write the texts that its heads learn from, or give
others with --config.data.path. `configs/medusa_llama2_7b.py:joint` trains adapters with the heads (Medusa-2), from a
run of heads. What it needs on each of 8 devices: --config.plan=cpu:8
"""

from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LlamaConfig,
    LoraConfig,
    MedusaConfig,
    MedusaFinetuneConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    require,
)


def get_config(stage: str = "heads") -> Config:
    require(stage in ("heads", "joint"), f"unknown {stage}; there are heads, joint")
    joint = stage == "joint"
    return Config(
        workdir=f"runs/llama2_7b/medusa_{stage}",
        model=LlamaConfig(
            attention=AugmentedConfig(local="relu2", group_size=64, convolution=32), dtype="bfloat16", remat="full"
        ),
        data=DataConfig(
            source="text",
            path=("data/llama2_7b_texts/*.jsonl",),
            tokenizer="checkpoint",
            sequence_length=2048,
            batch_size=64,
            packing="segments",
        ),
        optimizer=OptimizerConfig(
            peak_learning_rate=1e-4 if joint else 1e-3, schedule="cosine", warmup_steps=40, weight_decay=0.0
        ),
        train=TrainConfig(steps=2000, microbatches=8, evaluate_every=200),
        finetune=MedusaFinetuneConfig(
            checkpoint="runs/llama2_7b/medusa_heads" if joint else "runs/llama2_7b/lora_4096",
            train=(),
            lora=LoraConfig(rank=8 if joint else 0, alpha=16),
            frozen_dtype="bfloat16",
            medusa=MedusaConfig(heads=4, layers=1),
        ),
        checkpoint=CheckpointConfig(every=200),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
