"""Summaries with T5: T5-base on CNN/Daily Mail, or any pairs of texts, in each attention.

    python train.py --config configs/t5_summarize.py --config.finetune.checkpoint=DIR
    python train.py --config configs/t5_summarize.py:augmented --config.finetune.checkpoint=DIR
    python train.py --config configs/t5_summarize.py:cross,augmented --config.finetune.checkpoint=DIR

The first word says which attention is changed, of encoder, decoder, cross and all (which may be left out); the second
to which. Without one the model keeps softmax. DIR is a Hugging Face directory of T5, T5 v1.1 or FLAN-T5, or a run of
lin_jax, which gives the model's sizes, its parameters and its tokenizer. Data are TensorFlow Datasets' cnn_dailymail,
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
    OptimizerConfig,
    Seq2seqFinetuneConfig,
    SoftmaxConfig,
    T5Config,
    TrainConfig,
    require,
)

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
    unknown = [word for word in words if word not in (*PLACES, *attentions)]
    require(not unknown, f"unknown {', '.join(unknown)}; there are {', '.join([*PLACES, *attentions])}")
    places = [word for word in words if word in PLACES] or ["all"]
    names = [word for word in words if word in attentions] or ["softmax"]
    require(len(names) == 1, f"{', '.join(names)}: give one of them")
    model = T5Config(
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
    )
