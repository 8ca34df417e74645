"""The settings of an experiment: values of every type in every field, by every way that settings come in; checks."""

import dataclasses
import itertools
import re

import pytest

from lin_jax.attentions.registry import ATTENTIONS, preset_names
from lin_jax.experiment import (
    AugmentedConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    FlashConfig,
    Gpt2Config,
    LlamaConfig,
    LongloraConfig,
    MeshConfig,
    OptimizerConfig,
    QuadraticConfig,
    RopeConfig,
    SoftmaxConfig,
    TrainConfig,
    config_from_dict,
    config_parser,
    load_config,
    preset_attention,
)
from lin_jax.settings.command_line import apply_overrides, describe
from lin_jax.settings.dictionaries import section_to_dict
from lin_jax.settings.typed import annotations_of
from tests.every_field import CASES, PLACES, TEXTS, VALUES, cases, fits, reads, sections

FILE = """
from tests.every_field import CASES

def get_config(index):
    case = CASES[int(index)]
    return case.kind(**{case.field: case.value})
"""
NOT_A_CONFIG = "must return a Config, but gives"


FIELDS = sum(len(annotations_of(kind)) for kind in PLACES)


def refusal(call):
    """What `call` says where it refuses, in one line; None where it takes what it is given."""
    try:
        return None, call()
    except ConfigError as error:
        assert str(error).isprintable() and len(str(error)) < 4000
        return str(error), None


def test_every_class_of_settings_is_tried():
    assert set(PLACES) == {kind for kind, _, _ in sections()} and len(PLACES) >= 18
    assert len(CASES) == FIELDS * len(VALUES) and FIELDS > 120


def test_a_field_of_a_configuration_file_is_of_its_type_or_named_in_a_line(tmp_path):
    file = tmp_path / "experiment.py"
    file.write_text(FILE)
    refused = 0
    for index, case in enumerate(CASES):
        message, _ = refusal(lambda index=index: load_config(f"{file}:{index}"))
        taken = message is None or NOT_A_CONFIG in message  # A section alone is no Config.
        refused += not taken
        if not fits(case.value, case.annotation):
            named = re.match(rf"{re.escape(str(file))}, line 6: {case.field}\b", message or "")
            assert named and not taken, (case, message)
        elif taken:
            found = getattr(case.kind(**{case.field: case.value}), case.field)
            assert found == (tuple(case.value) if isinstance(case.value, list) else case.value), case
    print(f"{len(CASES)} pairs of {FIELDS} fields and {len(VALUES)} values in a file: {refused} refused in a line")
    assert refused > len(CASES) / 2


def test_a_field_on_the_command_line_is_of_its_type_or_named_in_a_line():
    refused = 0
    for case in cases(TEXTS):
        message, config = refusal(lambda case=case: apply_overrides(case.config, [f"--{case.name}={case.value}"]))
        right = reads(case.value, case.annotation)
        if message is None:
            assert right and fits(getattr(section_of(config, case), case.field), case.annotation), case
        else:  # What is of the right type may not suit another field, which is named then.
            assert message.startswith("config." if right else case.name), (case, message)
            refused += 1
    tried = FIELDS * len(TEXTS)
    print(f"{tried} pairs of {FIELDS} fields and {len(TEXTS)} texts on the command line: {refused} refused in a line")
    assert refused > tried / 2


def test_a_field_of_saved_settings_is_of_its_type_or_named_in_a_line():
    refused = 0
    for case in CASES:
        values = section_to_dict(case.config)
        section_of(values, case)[case.field] = case.value
        message, _ = refusal(lambda values=values: config_from_dict(values))
        right = fits(case.value, case.annotation) or isinstance(case.value, dict)  # A section is a dictionary here.
        if message is None:
            assert right, case
        else:
            assert message.startswith("config." if right else case.name) or "unknown field config." in message, case
            refused += 1
    print(
        f"{len(CASES)} pairs of {FIELDS} fields and {len(VALUES)} values in saved settings: {refused} refused in a line"
    )
    assert refused > len(CASES) / 2


def section_of(config, case):
    """The section of settings, or of a dictionary of them, in which the case's field is."""
    for part in case.section.split(".")[1:]:
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "experiment.py"
    file.write_text(
        "from lin_jax.experiment import Config\ndef get_config(name='default'):\n    return Config(workdir=name)\n"
    )
    return str(file)


def test_file_with_argument(config_file):
    assert load_config(config_file).workdir == "default"
    assert load_config(config_file + ":other").workdir == "other"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.steps=2_000", lambda c: c.train.steps, 2000),
        ("optimizer.peak_learning_rate=1e-4", lambda c: c.optimizer.peak_learning_rate, 1e-4),
        ("optimizer.peak_learning_rate=1", lambda c: c.optimizer.peak_learning_rate, 1.0),
        ("profile", lambda c: c.profile, True),
        ("model.token_shift=false", lambda c: c.model.token_shift, False),
        ("model.attention.local=none", lambda c: c.model.attention.local, "none"),
        ("model.attention.implementation=reference", lambda c: c.model.attention.implementation, "reference"),
        ("model.attention.implementation=None", lambda c: c.model.attention.implementation, None),
        ("data.separator=a=b", lambda c: c.data.separator, "a=b"),
        ("data.separator=None", lambda c: c.data.separator, None),
        ("data.path=a.txt,b*.gz", lambda c: c.data.path, ("a.txt", "b*.gz")),
        ("data.path=('a,b.txt',)", lambda c: c.data.path, ("a,b.txt",)),
        ("data.path=", lambda c: c.data.path, ()),
        ("mesh.data=-1", lambda c: c.mesh.data, -1),
    ],
)
def test_values_are_read_by_their_annotation(override, read, value):
    result = read(apply_overrides(Config(), ["--config." + override]))
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown field config.train.stepz; did you mean steps?"),
        ("trian.steps=3", "unknown field config.trian; did you mean train?"),
        ("train.steps=1.5", "config.train.steps must be a whole number, but is"),
        ("train.steps", "config.train.steps needs a value"),
        ("optimizer.beta1=high", 'config.optimizer.beta1 must be a number, but is "high"'),
        ("optimizer.weight_decay=nan", "config.optimizer.weight_decay must be a finite number"),
        ("profile=maybe", 'config.profile must be true or false, but is "maybe"'),
        ("model.attention.local=tanh", "must be one of relu2, laplace, softmax, none"),
        ("model.attention=best", "config.model.attention must be one of augmented, softmax, "),
        ("model=big", "config.model must be one of flash, llama, gpt2"),
        ("train=big", "config.train is a section"),
        ("workdir.name=x", "config.workdir is not a section"),
        ("model.attention.group_size=0", "config.model.attention.group_size must be greater than 0, but is 0"),
        ("data.source=text", "config.data.path is empty"),
        ("mesh.fsdp=0", "config.mesh.fsdp must be"),
        ("train.microbatches=3", "config.data.batch_size=8 is not divisible by train.microbatches=3"),
    ],
)
def test_wrong_overrides_are_named(override, message):
    with pytest.raises(ConfigError) as error:
        apply_overrides(Config(), ["--config." + override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_argument_that_is_no_setting_is_refused():
    with pytest.raises(ConfigError, match="unexpected argument '--steps=3'"):
        apply_overrides(Config(), ["--steps=3"])


def test_order_does_not_matter():
    overrides = [
        "--config.data.source=text",
        "--config.data.path=x.txt",
        "--config.train.microbatches=3",
        "--config.data.batch_size=9",
        "--config.model.attention.group_size=64",
        "--config.model.attention=local_grouped",
    ]
    results = {apply_overrides(Config(), order) for order in itertools.permutations(overrides)}
    assert len(results) == 1
    assert results.pop().model.attention == preset_attention(AugmentedConfig(group_size=64), "local_grouped")


@pytest.mark.parametrize("name", preset_names())
def test_ablation_by_one_override(name):
    # FLASH has every kind but one, which the others have.
    config = Config(model=LlamaConfig()) if name == "longlora" else Config()
    changed = apply_overrides(config, [f"--config.model.attention={name}"])
    assert changed.model.attention == preset_attention(config.model.attention, name)


def test_dictionary_round_trip_and_unknown_key():
    config = Config(data=DataConfig(path=("a", "b")))
    assert config_from_dict(section_to_dict(config)) == config
    with pytest.raises(ConfigError, match=r"config\.data\.pathh; did you mean path"):
        config_from_dict({"data": {"pathh": []}})


@pytest.mark.parametrize("model", [FlashConfig(), LlamaConfig(depth=3), Gpt2Config(labels=2)])
def test_the_type_of_the_model_survives(model):
    config = Config(model=model)
    assert config_from_dict(section_to_dict(config)) == config
    changed = apply_overrides(config, ["--config.model.width=96"])
    assert type(changed.model) is type(model) and changed.model.width == 96


def test_settings_without_an_architecture_are_flash():
    values = section_to_dict(Config())
    del values["model"]["architecture"]
    assert config_from_dict(values) == Config()
    with pytest.raises(ConfigError, match="unknown architecture 'rnn'"):
        config_from_dict({"model": {"architecture": "rnn"}})


ATTENTION = {
    "kind=quadratic": QuadraticConfig(),
    "causal=false": AugmentedConfig(causal=False),
    "feature_map=favor": AugmentedConfig(feature_map="favor"),
    "a layer that depth=2 does not have": AugmentedConfig(softmax_layers=(0, 2)),
}


@pytest.mark.parametrize("message", ATTENTION)
@pytest.mark.parametrize("kind", [LlamaConfig, Gpt2Config])
def test_attention_that_a_transformer_does_not_have(kind, message):
    with pytest.raises(ConfigError, match=message):
        kind(depth=2, attention=ATTENTION[message])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LlamaConfig(heads=8, key_value_heads=3), "heads=8 is not divisible by key_value_heads=3"),
        (lambda: LlamaConfig(head_size=7), "head_size must be even"),
        (lambda: Gpt2Config(width=50, heads=4), "width=50 is not divisible by heads=4"),
        (lambda: Gpt2Config(labels=-1), "labels must be 0 or more"),
        (lambda: RopeConfig(factor=0.5), "factor must be 1 or more"),
        (lambda: AugmentedConfig(softmax_layers=(1, 1)), "different layers"),
        (lambda: AugmentedConfig(softmax_layers=(-1,)), "different layers"),
        (lambda: FlashConfig(attention=LongloraConfig()), "not for FLASH"),
        (lambda: FlashConfig(attention=AugmentedConfig(softmax_layers=(0,))), "softmax_layers=.* not for FLASH"),
        (lambda: Config(model=Gpt2Config(positions=64)), "sequence_length=1024 is more than the model's positions=64"),
    ],
)
def test_wrong_models_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_help_names_every_setting():
    text = describe(Config())
    for name in ("--config.workdir=", "--config.model.attention.local_groups=1", "--config.mesh.fsdp=1"):
        assert name in text
    with pytest.raises(ConfigError, match="--config"):
        config_parser("").parse_known_args([])


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
