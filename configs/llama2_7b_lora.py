"""LLaMA-2-7B linearized and finetuned with LoRA, in the paper's setting.

Convert the checkpoint first:

    python convert_weights.py --input meta-llama/Llama-2-7b-hf --output runs/llama2_7b/original

and give documents with --config.data.path (the official code trains on the sample of RedPajama, documents under 50,000
characters). After the file's name stand the length of rows and the devices: `configs/llama2_7b_lora.py:8192,8xh100`
has rows of 8,192 tokens, rotary positions stretched twofold, and is cut for 8 H100; there are v5e-64 (64 chips, the
default), v5p-32 (16 chips), 8xa100 and 8xh100. What it needs there is printed by --config.plan=v5e:8x8, v5p:2x2x4,
a100:8 or h100:8, and is in docs/pods.md.
"""

from lin_jax.experiment import (
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
    require,
)

# Devices, and tokens that each works through at a time.
DEVICES = {"v5e-64": (64, 4096), "v5p-32": (16, 16384), "8xa100": (8, 8192), "8xh100": (8, 8192)}
ROWS = 64


def get_config(variant: str = "4096") -> Config:
    names = [name for name in variant.split(",") if not name.isdigit()] or ["v5e-64"]
    require(
        names[0] in DEVICES and len(names) == 1, f"unknown devices {','.join(names)}; there are {', '.join(DEVICES)}"
    )
    length = next((int(name) for name in variant.split(",") if name.isdigit()), 4096)
    devices, tokens = DEVICES[names[0]]
    sequence = max(1, length // (2 * tokens))  # Parts of a row that is too long for one device.
    microbatches = max(1, ROWS * sequence // (devices * max(1, tokens // length)))
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
            batch_size=ROWS,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=2e-5, schedule="constant", warmup_steps=20, weight_decay=0.0),
        train=TrainConfig(steps=1000, microbatches=microbatches, evaluate_every=100),
        finetune=FinetuneConfig(
            checkpoint="runs/llama2_7b/original",
            train=("new", "norm", "embedding"),
            lora=LoraConfig(rank=8, alpha=16),
            frozen_dtype="bfloat16",
        ),
        checkpoint=CheckpointConfig(every=100),
        mesh=MeshConfig(data=1, fsdp=-1, sequence=sequence, rules=("width=fsdp+sequence",) if sequence > 1 else ()),
    )
