"""Every check of the configuration, and what the ablations are."""

import dataclasses

import pytest

from lin_jax.attentions.registry import ATTENTIONS, preset_names
from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    FlashConfig,
    MeshConfig,
    OptimizerConfig,
    SoftmaxConfig,
    TrainConfig,
    preset_attention,
)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (AugmentedConfig, {"group_size": 0}, "group_size must be greater than 0, but is 0"),
        (AugmentedConfig, {"local_groups": 0}, "local_groups must be greater than 0"),
        (AugmentedConfig, {"feature_size": -1}, "feature_size must be greater than 0"),
        (AugmentedConfig, {"feature_map": "fourier", "feature_size": 7}, "feature_size must be even"),
        (AugmentedConfig, {"convolution": -1}, "convolution must be 0 or more, but is -1"),
        (AugmentedConfig, {"local": "none", "grouped": False, "convolution": 0}, "nothing to compute"),
        *[
            (FlashConfig, {name: 0}, f"{name} must be greater than 0, but is 0")
            for name in ("vocabulary_size", "width", "depth", "query_key_size", "bias_max_distance")
        ],
        (FlashConfig, {"expansion": 0.0}, "expansion must be greater than 0, but is 0.0"),
        (FlashConfig, {"width": 15}, "width must be even"),
        (FlashConfig, {"rotary_size": -2}, "rotary_size must be 0 or more"),
        (FlashConfig, {"rotary_size": 3}, "rotary_size must be even and at most query_key_size=128, but is 3"),
        (FlashConfig, {"rotary_size": 130}, "rotary_size must be even and at most query_key_size=128, but is 130"),
        (FlashConfig, {"bias_buckets": 0}, "bias_buckets must be a positive multiple of 4"),
        (FlashConfig, {"bias_buckets": 30}, "bias_buckets must be a positive multiple of 4"),
        (FlashConfig, {"bias_max_distance": 16}, "bias_max_distance must exceed bias_buckets/2=16"),
        (FlashConfig, {"width": 10, "expansion": 1.25}, r"width \* expansion must be whole, but is 12.5"),
        (DataConfig, {"sequence_length": 0}, "sequence_length must be greater than 0"),
        (DataConfig, {"batch_size": 0}, "batch_size must be greater than 0"),
        (DataConfig, {"tokenizer_vocabulary": 0}, "tokenizer_vocabulary must be greater than 0"),
        (DataConfig, {"seed": -1}, "seed must be 0 or more, but is -1"),
        (DataConfig, {"seed": 2**32}, "seed must be at most 4294967295, but is 4294967296"),
        (DataConfig, {"validation_fraction": 0.0}, "validation_fraction must lie between 0 and 1, but is 0.0"),
        (DataConfig, {"validation_fraction": 1.0}, "validation_fraction must lie between 0 and 1, but is 1.0"),
        (DataConfig, {"source": "text"}, "path is empty: give files with --config.data.path="),
        (DataConfig, {"separator": ""}, "separator must not be the empty string"),
        (OptimizerConfig, {"peak_learning_rate": 0.0}, "peak_learning_rate must be greater than 0"),
        (OptimizerConfig, {"epsilon": 0.0}, "epsilon must be greater than 0"),
        *[
            (OptimizerConfig, {name: -1.0}, f"{name} must be 0 or more, but is -1.0")
            for name in ("end_learning_rate", "weight_decay", "gradient_clip", "z_loss")
        ],
        (OptimizerConfig, {"warmup_steps": -1}, "warmup_steps must be 0 or more, but is -1"),
        (OptimizerConfig, {"beta1": 1.0}, r"beta1 must lie in \[0, 1\), but is 1.0"),
        (OptimizerConfig, {"beta2": -0.1}, r"beta2 must lie in \[0, 1\), but is -0.1"),
        *[
            (TrainConfig, {name: 0}, f"{name} must be greater than 0, but is 0")
            for name in ("steps", "microbatches", "loss_chunk", "log_every", "max_skipped")
        ],
        (TrainConfig, {"evaluate_every": -1}, "evaluate_every must be 0 or more"),
        (TrainConfig, {"evaluate_batches": -1}, "evaluate_batches must be 0 or more"),
        (TrainConfig, {"seed": -1}, "seed must be 0 or more, but is -1"),
        (CheckpointConfig, {"every": -1}, "every must be 0 or more"),
        (CheckpointConfig, {"keep": 0}, "keep must be greater than 0"),
        (MeshConfig, {"data": 0}, "data must be a number of devices or -1, but is 0"),
        (MeshConfig, {"fsdp": -2}, "fsdp must be a number of devices or -1, but is -2"),
        (MeshConfig, {"data": -1, "fsdp": -1}, "only one mesh axis may be -1"),
        (
            Config,
            {"train": TrainConfig(microbatches=3)},
            "data.batch_size=8 is not divisible by train.microbatches=3",
        ),
        (
            Config,
            {"train": TrainConfig(steps=10), "optimizer": OptimizerConfig(warmup_steps=10)},
            "optimizer.warmup_steps=10 must be smaller than train.steps=10",
        ),
        (
            Config,
            {"data": DataConfig(packing="segments"), "model": FlashConfig(padding="released")},
            "data.packing=segments keeps documents apart",
        ),
    ],
)
def test_refuses(kind, fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        kind(**fields)
    assert "\n" not in str(error.value)


def test_what_lies_on_a_border_is_taken():
    AugmentedConfig(group_size=1, local="none", grouped=False, convolution=1)
    SoftmaxConfig(causal=False)
    FlashConfig(rotary_size=0, bias_buckets=4, bias_max_distance=3)
    OptimizerConfig(beta1=0.0, gradient_clip=0.0)
    Config(train=TrainConfig(steps=1), optimizer=OptimizerConfig(schedule="constant", warmup_steps=5))
    Config(data=DataConfig(source="text", validation_path=("held_out.txt",), packing="segments"))


@pytest.mark.parametrize("name", sorted(preset_names()))
def test_an_ablation_keeps_what_it_does_not_name(name):
    attention = AugmentedConfig(group_size=7, local="laplace", local_groups=3, convolution=9)
    changed, kind = preset_attention(attention, name), preset_names()[name]
    assert changed.kind == kind and type(changed) is ATTENTIONS[kind].settings
    expected = {**dataclasses.asdict(attention), "kind": kind, **ATTENTIONS[kind].presets[name]}
    fields = dataclasses.asdict(changed)
    assert {field: value for field, value in fields.items() if field in expected} == {
        field: value for field, value in expected.items() if field in fields
    }


def test_unknown_ablation():
    with pytest.raises(ConfigError, match="unknown ablation 'best'; there are local, grouped"):
        preset_attention(AugmentedConfig(), "best")


def all_fields(kind):
    for field in dataclasses.fields(kind):
        yield kind, field
        if dataclasses.is_dataclass(field.default_factory):
            yield from all_fields(field.default_factory)


def test_every_field_is_documented():
    fields = list(all_fields(Config))
    assert len(fields) > 60
    for kind, field in fields:
        assert field.metadata["doc"], f"{kind.__name__}.{field.name}"


def test_value_size():
    assert FlashConfig(width=768, expansion=2.0).value_size == 1536
    assert FlashConfig(width=10, expansion=1.5).value_size == 15
