"""Settings from files and the command line: types, names and messages."""

import itertools

import pytest

from lin_jax.attentions.registry import preset_names
from lin_jax.experiment import (
    AugmentedConfig,
    Config,
    ConfigError,
    DataConfig,
    FlashConfig,
    Gpt2Config,
    LlamaConfig,
    LongloraConfig,
    QuadraticConfig,
    RopeConfig,
    preset_attention,
)
from lin_jax.settings.command_line import (
    apply_overrides,
    config_from_dict,
    config_parser,
    config_to_dict,
    describe,
    load_config,
)


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
        ("train.steps=1.5", "config.train.steps expects a whole number, but is '1.5'"),
        ("train.steps", "config.train.steps needs a value"),
        ("optimizer.beta1=high", "config.optimizer.beta1 expects a number, but is 'high'"),
        ("optimizer.weight_decay=nan", "config.optimizer.weight_decay expects a number"),
        ("profile=maybe", "config.profile expects true or false, but is 'maybe'"),
        ("model.attention.local=tanh", "expects one of relu2, laplace, softmax, none"),
        ("model.attention=best", "config.model.attention expects one of local, grouped"),
        ("model=big", "config.model is a section"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "has no get_config"),
        ("def get_config():\n    return 3\n", "must return a Config, but gives int"),
        ("def get_config(:\n", "line 1"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, message):
    file = tmp_path / "experiment.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(file))


def test_missing_file_and_useless_argument(tmp_path):
    with pytest.raises(ConfigError, match="absent.py does not exist"):
        load_config(str(tmp_path / "absent.py"))
    file = tmp_path / "plain.py"
    file.write_text("def get_config():\n    pass\n")
    with pytest.raises(ConfigError, match="takes no argument"):
        load_config(f"{file}:big")


def test_dictionary_round_trip_and_unknown_key():
    config = Config(data=DataConfig(path=("a", "b")))
    assert config_from_dict(config_to_dict(config)) == config
    with pytest.raises(ConfigError, match=r"config\.data\.pathh; did you mean path"):
        config_from_dict({"data": {"pathh": []}})


@pytest.mark.parametrize("model", [FlashConfig(), LlamaConfig(depth=3), Gpt2Config(labels=2)])
def test_the_type_of_the_model_survives(model):
    config = Config(model=model)
    assert config_from_dict(config_to_dict(config)) == config
    changed = apply_overrides(config, ["--config.model.width=96"])
    assert type(changed.model) is type(model) and changed.model.width == 96


def test_settings_without_an_architecture_are_flash():
    values = config_to_dict(Config())
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
