r"""Medusa heads for a trained LLaMA of 260 thousand parameters, in minutes on a CPU.

The model is llama2.c's stories260K in Hugging Face's form, with softmax attention; `:augmented` is the linearized one:

    python convert_weights.py --input stories260k_hf --output runs/stories260k/softmax
    python convert_weights.py --input stories260k_hf --output runs/stories260k/augmented --attention augmented \
        --config.model.attention.local=softmax --config.model.attention.feature_map=relu \
        --config.model.attention.local_groups=2

Heads learn what the model itself writes (self-distillation); `python -m benchmarks.medusa` does all of it: it converts,
lets the model write, trains, and compares. `configs/medusa_stories260k.py:augmented,joint` goes on from there and
trains the model too (Medusa-2), on the same texts.
"""

from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LlamaConfig,
    MedusaConfig,
    MedusaFinetuneConfig,
    OptimizerConfig,
    SoftmaxConfig,
    TrainConfig,
    require,
)

ATTENTION = {
    "softmax": SoftmaxConfig(),
    "augmented": AugmentedConfig(local="softmax", feature_map="relu", group_size=64, local_groups=2),
}


def get_config(attention: str = "softmax,heads") -> Config:
    kind, _, stage = attention.partition(",")
    known = kind in ATTENTION and stage in ("", "heads", "joint")
    require(known, f"unknown {attention}; there are softmax, augmented, each alone or with ,heads or ,joint after it")
    joint = stage == "joint"
    return Config(
        workdir=f"runs/stories260k/medusa_{kind}{'_joint' if joint else ''}",
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
            attention=ATTENTION[kind],
        ),
        data=DataConfig(
            source="text",
            path=(f"runs/stories260k/{kind}_texts/train.jsonl",),
            validation_path=(f"runs/stories260k/{kind}_texts/valid.jsonl",),
            tokenizer="checkpoint",
            sequence_length=256,
            batch_size=16,
            packing="segments",
        ),
        optimizer=OptimizerConfig(
            peak_learning_rate=2e-4 if joint else 5e-3, schedule="cosine", warmup_steps=20, weight_decay=0.0
        ),
        train=TrainConfig(steps=1000, evaluate_every=250, evaluate_batches=0, log_every=50),
        finetune=MedusaFinetuneConfig(
            checkpoint=f"runs/stories260k/medusa_{kind}" if joint else f"runs/stories260k/{kind}",
            train=("all",) if joint else (),
            medusa=MedusaConfig(heads=4, layers=1, tree_nodes=32),
        ),
        checkpoint=CheckpointConfig(every=250),
    )
