"""Summaries with T5: T5-base on CNN/Daily Mail, or any pairs of texts, in each attention.

    python train.py --config configs/t5_summarize.py --config.finetune.checkpoint=DIR
    python train.py --config configs/t5_summarize.py:augmented --config.finetune.checkpoint=DIR
    python train.py --config configs/t5_summarize.py:cross,augmented --config.finetune.checkpoint=DIR
    python train.py --config configs/t5_summarize.py:3b --config.plan=v5e:2x2

Words say which attention is changed, of encoder, decoder, cross and all (which may be left out), and to which; without
one the model keeps softmax. DIR is a Hugging Face directory of T5, T5 v1.1 or FLAN-T5, or a run of lin_jax, which gives
the model's sizes, its parameters and its tokenizer; for a plan, base, small, large or 3b say the sizes. 3b cuts
parameters over the devices, and computes layers twice to save memory. Data are TensorFlow Datasets' cnn_dailymail,
which must be prepared once; pairs of your own are

    --config.data.source=table --config.data.path=pairs.jsonl --config.data.text_field=A --config.data.target_field=B
"""

import dataclasses

from lin_jax.attentions.registry import ATTENTIONS, preset_attention, preset_names, with_kind
from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Seq2seqFinetuneConfig,
    SoftmaxConfig,
    T5Config,
    TrainConfig,
    require,
)

# Sizes of T5 v1.0 (Raffel et al., 2020): C, layers of each stack, H, D, F.
SIZES = {
    "small": (512, 6, 8, 64, 2048),
    "base": (768, 12, 12, 64, 3072),
    "large": (1024, 24, 16, 64, 4096),
    "3b": (1024, 24, 32, 128, 16384),
}
# The words for attentions, with their fields.
PLACES = {
    "encoder": ("encoder_attention",),
    "decoder": ("attention",),
    "cross": ("cross_attention",),
    "all": ("encoder_attention", "attention", "cross_attention"),
}


def get_config(variant: str = "all,softmax") -> Config:
    words = variant.split(",")
    attentions = list(dict.fromkeys([*ATTENTIONS, *preset_names()]))
    known = [*PLACES, *attentions, *SIZES]
    unknown = [word for word in words if word not in known]
    require(not unknown, f"unknown {', '.join(unknown)}; there are {', '.join(known)}")
    sizes = [word for word in words if word in SIZES] or ["base"]
    require(len(sizes) == 1, f"{', '.join(sizes)}: give one of them")
    width, depth, heads, head_size, feed_forward_size = SIZES[sizes[0]]
    large = sizes[0] == "3b"
    places = [word for word in words if word in PLACES] or ["all"]
    names = [word for word in words if word in attentions] or ["softmax"]
    require(len(names) == 1, f"{', '.join(names)}: give one of them")
    model = T5Config(
        width=width,
        depth=depth,
        encoder_depth=depth,
        heads=heads,
        head_size=head_size,
        feed_forward_size=feed_forward_size,
        dropout=0.1,
        dtype="bfloat16" if large else "float32",
        remat="full" if large else "none",
        attention=SoftmaxConfig(),
        encoder_attention=SoftmaxConfig(causal=False),
        cross_attention=SoftmaxConfig(causal=False),
    )
    for field in [field for place in places for field in PLACES[place]]:
        start = AugmentedConfig(group_size=64, causal=getattr(model, field).causal)
        chosen = with_kind(start, names[0]) if names[0] in ATTENTIONS else preset_attention(start, names[0])
        model = dataclasses.replace(model, **{field: chosen})
    return Config(
        workdir=f"runs/t5_summarize/{'_'.join([*places, *names])}",
        model=model,
        data=DataConfig(
            source="tfds",
            tfds_name="cnn_dailymail",
            text_field="article",
            target_field="highlights",
            prefix="summarize: ",
            tokenizer="checkpoint",
            sequence_length=512,
            target_length=128,
            batch_size=16,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=1e-4, schedule="linear", weight_decay=0.0),
        train=TrainConfig(epochs=3.0, evaluate_every=2000, evaluate_batches=50),
        finetune=Seq2seqFinetuneConfig(checkpoint="runs/t5/original", settings="checkpoint"),
        checkpoint=CheckpointConfig(every=1000),
        mesh=MeshConfig(data=1, fsdp=-1) if large else MeshConfig(),
    )
