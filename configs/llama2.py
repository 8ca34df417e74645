"""LLaMA-2 linearized and finetuned, in the paper's setting.

Convert the checkpoint first:

    python convert_weights.py --input meta-llama/Llama-2-7b-hf --output runs/llama2_7b/original

and give documents with --config.data.path (the official code trains on the sample of RedPajama, documents under 50,000
characters). After the file's name stand, in any order and separated by commas:

    7b, 13b                         the model; 7b where nothing is said
    lora                            adapters, norms, embeddings and what is new train; else everything does
    4096, 8192, ...                 the length of rows; beyond 4,096 rotary positions are stretched
    v5e-64, v5p-32, 8xa100, 8xh100  what it is cut for: 64 TPU v5e, 16 v5p, 8 GPUs; v5e-64 where nothing is said

such as `configs/llama2.py:13b,lora,8192,8xh100`. What it needs there is printed by --config.plan=v5e:8x8, v5p:2x2x4,
a100:8 or h100:8, and is in docs/pods.md.
"""

import dataclasses

from lin_jax.experiment import (
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

MODELS = {
    "7b": LlamaConfig(dtype="bfloat16", remat="full"),
    "13b": LlamaConfig(
        width=5120, depth=40, heads=40, key_value_heads=40, feed_forward_size=13824, dtype="bfloat16", remat="full"
    ),
}
# How many there are, and the tokens that each works through at a time, by model.
DEVICES = {
    "v5e-64": (64, {"7b": 4096, "13b": 4096}),
    "v5p-32": (16, {"7b": 16384, "13b": 8192}),
    "8xa100": (8, {"7b": 8192, "13b": 4096}),
    "8xh100": (8, {"7b": 8192, "13b": 4096}),
}
ROWS = 64


def get_config(variant: str = "7b") -> Config:
    size, lora, length, devices = read_variant(variant)
    count, tokens_of = DEVICES[devices]
    tokens = tokens_of[size]
    sequence = max(1, length // (2 * tokens))  # Parts of a row that is too long for one device.
    microbatches = max(1, ROWS * sequence // (count * max(1, tokens // length)))
    rope = RopeConfig(scaling="linear", factor=length / 4096) if length > 4096 else RopeConfig()
    adapted = {"train": ("new", "norm", "embedding"), "lora": LoraConfig(rank=8, alpha=16), "frozen_dtype": "bfloat16"}
    return Config(
        workdir=f"runs/llama2_{size}/{'lora' if lora else 'full'}_{length}",
        model=dataclasses.replace(MODELS[size], rope=rope),
        data=DataConfig(
            source="text",
            path=("data/redpajama_sample/*.jsonl",),
            tokenizer="checkpoint",
            sequence_length=length,
            batch_size=ROWS,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=2e-5, schedule="constant", warmup_steps=20, weight_decay=0.0),
        train=TrainConfig(steps=1000, microbatches=microbatches, evaluate_every=100),
        finetune=FinetuneConfig(checkpoint=f"runs/llama2_{size}/original", **(adapted if lora else {})),
        checkpoint=CheckpointConfig(every=100),
        mesh=MeshConfig(data=1, fsdp=-1, sequence=sequence, rules=("width=fsdp+sequence",) if sequence > 1 else ()),
    )


def read_variant(text: str) -> tuple[str, bool, int, str]:
    """Return the model, whether adapters train, the length of rows and the devices that `text` names."""
    words = text.split(",")
    sizes, devices = ([word for word in words if word in table] for table in (MODELS, DEVICES))
    lengths = [word for word in words if word.isdecimal() and int(word) > 0]
    unknown = [word for word in words if word not in {*sizes, *devices, *lengths, "lora"}]
    known = f"there are {', '.join([*MODELS, 'lora', *DEVICES])} and lengths of rows"
    require(not unknown, f"unknown {', '.join(unknown)}; {known}")
    require(max(map(len, (sizes, devices, lengths))) <= 1, f"{text} names a thing twice; {known}")
    return (sizes or ["7b"])[0], "lora" in words, int((lengths or ["4096"])[0]), (devices or ["v5e-64"])[0]
