"""Every configuration file with every argument that it takes, and arguments that it does not."""

import itertools
from pathlib import Path

import pytest

from lin_jax.experiment import Config, ConfigError, OptimizerConfig
from lin_jax.settings.config_file import call_get_config

CONFIGS = Path(__file__).parents[2] / "configs"
VARIANTS = {
    "bert_mlm": ["", "softmax", "local_grouped"],
    "flash110m": ["", "8xa100", "v5e-8"],
    "flash_enwik8": [""],
    "glue": ["", "gpt2,sst2", "augmented,mnli,gpt2", "stsb", "longlora,wnli", "bert,local", "t5,rte,released_t5"],
    "gpt2_wikitext2": ["", "finetune", "scratch", "small"],
    "llama2": ["", "7b", "13b", "lora", "8192", "8xh100", "8xh100,16384,lora,13b"],
    "medusa_llama2_7b": ["", "heads", "joint"],
    "medusa_stories260k": ["", "softmax", "augmented", "softmax,heads", "augmented,joint"],
    "quickstart": [""],
    "stories260k": ["", "finetune", "transfer"],
    "t5_headings": ["", "augmented"],
    "t5_summarize": ["", "augmented", "cross,augmented", "encoder,decoder,local", "3b,released_t5"],
    "wikitext2_ablation": [""],
}


def config_of(name, variant=""):
    return call_get_config(f"{CONFIGS}/{name}.py" + (f":{variant}" if variant else ""))


def test_all_files_are_here():
    assert sorted(path.stem for path in CONFIGS.glob("*.py")) == sorted(VARIANTS)


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name, variants in VARIANTS.items() for variant in variants]
)
def test_every_variant_is_a_config(name, variant):
    config = config_of(name, variant)
    assert isinstance(config, Config) and config.workdir.startswith("runs/") and config.optimizer != OptimizerConfig()


@pytest.mark.parametrize("name", [name for name, variants in VARIANTS.items() if len(variants) > 1])
def test_an_unknown_variant_is_refused_with_those_there_are(name):
    with pytest.raises(ConfigError, match="unknown (devices )?nonsense; there are "):
        config_of(name, "nonsense")


@pytest.mark.parametrize("variant", ["7b,13b", "4096,8192", "v5e-64,v5p-32", "0", "7b,,lora", "7B", "-1"])
def test_what_llama2_does_not_take(variant):
    with pytest.raises(ConfigError, match=r"configs/llama2.py, line \d+: .*; there are 7b, 13b, lora, v5e-64"):
        config_of("llama2", variant)


# The widths of the models (Touvron et al., 2023), and rows of the official code.
SIZES = {"7b": (4096, 32, 32, 11008), "13b": (5120, 40, 40, 13824)}
DEVICES = {"v5e-64": 64, "v5p-32": 16, "8xa100": 8, "8xh100": 8}


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("length", [2048, 4096, 8192, 32768, 65536])
@pytest.mark.parametrize(("size", "lora"), [*itertools.product(SIZES, (False, True))])
def test_llama2_in_any_order(size, lora, length, devices):
    words = [size, *(["lora"] if lora else []), str(length), devices]
    config = config_of("llama2", ",".join(words))
    assert config == config_of("llama2", ",".join(reversed(words)))
    model, attention = config.model, config.model.attention
    assert (model.width, model.depth, model.heads, model.feed_forward_size) == SIZES[size]
    assert (attention.kind, attention.local, attention.group_size, attention.convolution) == (
        "augmented",
        "relu2",
        64,
        32,
    )
    assert model.key_value_heads == model.heads and model.head_size * model.heads == model.width
    assert config.finetune.lora.rank == (8 if lora else 0) and config.finetune.train[0] == ("new" if lora else "all")
    assert config.data.sequence_length == length and model.rope.factor == max(1, length / 4096)
    # All devices have something to do in each microbatch, and none more than a row of 32 thousand tokens.
    rows = config.data.batch_size // config.train.microbatches
    assert rows * config.mesh.sequence >= DEVICES[devices] or config.train.microbatches == 1
    assert rows * length / DEVICES[devices] <= 32768
