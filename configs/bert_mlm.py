"""Masked language modelling with BERT on WikiText-2: to adapt a linearized BERT before it is finetuned.

    python train.py --config configs/bert_mlm.py --config.finetune.checkpoint=DIR
    python train.py --config configs/bert_mlm.py:softmax --config.finetune.checkpoint=DIR
    python train.py --config configs/glue.py:bert,augmented --config.finetune.checkpoint=runs/bert_mlm/augmented

DIR is a Hugging Face directory or a run of lin_jax, which gives the model's sizes, its parameters and its tokenizer; a
head for masked tokens is new unless it has one. The word behind the colon is the attention, augmented without it. Files
elsewhere: --config.data.path=FILE --config.data.validation_path=FILE
"""

from lin_jax.attentions.registry import ATTENTIONS, preset_attention, preset_names, with_kind
from lin_jax.experiment import (
    AugmentedConfig,
    BertConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    MaskedFinetuneConfig,
    OptimizerConfig,
    TrainConfig,
    require,
)


def get_config(variant: str = "augmented") -> Config:
    known = list(dict.fromkeys([*ATTENTIONS, *preset_names()]))
    require(variant in known, f"unknown {variant}; there are {', '.join(known)}")
    start = AugmentedConfig(group_size=64, causal=False)
    attention = with_kind(start, variant) if variant in ATTENTIONS else preset_attention(start, variant)
    return Config(
        workdir=f"runs/bert_mlm/{variant}",
        model=BertConfig(attention=attention, dropout=0.1),
        data=DataConfig(
            source="text",
            path=("data/wikitext2/wiki.train.tokens",),
            validation_path=("data/wikitext2/wiki.valid.tokens",),
            tokenizer="checkpoint",
            sequence_length=256,
            batch_size=32,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=1e-4, schedule="linear", warmup_steps=100),
        train=TrainConfig(steps=2000, evaluate_every=250, evaluate_batches=0),
        finetune=MaskedFinetuneConfig(checkpoint="runs/bert/original", settings="checkpoint"),
        checkpoint=CheckpointConfig(every=250),
    )
