"""GLUE in the paper's setting: three epochs, rows of 256 tokens, batches of 32, AdamW, a linear decay without warmup.

    python train.py --config configs/glue.py:gpt2,sst2 --config.finetune.checkpoint=DIR
    python train.py --config configs/glue.py:bert,mnli,augmented --config.finetune.checkpoint=DIR
    python train.py --config configs/glue.py:t5,rte,released_t5 --config.finetune.checkpoint=DIR

The model, the task and the attention stand in any order; without an attention the model keeps softmax. DIR is a
Hugging Face directory or a run of lin_jax, which gives the model's sizes, its parameters and its tokenizer; the head
is new unless it has one. The data are read from data/glue, which holds SST-2/train.tsv and so on
(--config.data.path=DIR is another place; --config.data.path= reads TensorFlow Datasets' glue). Two tasks are small and
are often trained for longer: --config.train.epochs=5 for mrpc and wnli.
"""

import dataclasses

from lin_jax.attentions.registry import ATTENTIONS, preset_attention, preset_names, with_kind
from lin_jax.data.glue import GLUE
from lin_jax.experiment import (
    AugmentedConfig,
    BertConfig,
    CheckpointConfig,
    ClassificationFinetuneConfig,
    Config,
    DataConfig,
    Gpt2Config,
    OptimizerConfig,
    T5Config,
    TrainConfig,
    require,
)

# The dropout that they were trained with. On a CPU the gradient of MiniLM takes 310 ms instead of 377 where only the
# results of products are kept (batch 32 x 32), and anywhere less memory.
TRAINING = {"dropout": 0.1, "remat": "dots"}
# Each with the way in which its tokens see each other; the three attentions of T5 are changed alike.
MODELS = {
    "gpt2": Gpt2Config(attention=AugmentedConfig(group_size=64), **TRAINING),
    "bert": BertConfig(attention=AugmentedConfig(group_size=64, causal=False), masked_head=False, **TRAINING),
    "t5": T5Config(**TRAINING),
}


def get_config(variant: str = "gpt2,sst2") -> Config:
    words = variant.split(",")
    attentions = [*ATTENTIONS, *preset_names()]
    model, task, attention = (
        _one(words, table, otherwise)
        for table, otherwise in ((MODELS, "gpt2"), (GLUE, "sst2"), (attentions, "softmax"))
    )
    unknown = [word for word in words if word not in (*MODELS, *GLUE, *attentions)]
    known = ", ".join([*MODELS, *GLUE, *dict.fromkeys(attentions)])
    require(not unknown, f"unknown {', '.join(unknown)}; there are {known}")
    change = with_kind if attention in ATTENTIONS else preset_attention
    start = MODELS[model]
    chosen = {field: change(getattr(start, field), attention) for field in start.attention_fields}
    return Config(
        workdir=f"runs/glue/{model}_{task}_{attention}",
        model=dataclasses.replace(start, **chosen),
        data=DataConfig(
            source="glue",
            task=task,
            path=("data/glue",),
            tokenizer="checkpoint",
            sequence_length=256,
            batch_size=32,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=2e-5, schedule="linear"),
        train=TrainConfig(epochs=3.0, evaluate_every=500, evaluate_batches=0),
        finetune=ClassificationFinetuneConfig(checkpoint=f"runs/{model}/original", settings="checkpoint"),
        checkpoint=CheckpointConfig(every=500),
    )


def _one(words, table, otherwise):
    found = [word for word in words if word in table]
    require(len(found) <= 1, f"{', '.join(found)}: give one of them")
    return found[0] if found else otherwise
