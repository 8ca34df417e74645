"""Plans: what they are for, what they count, and what they advise, with a compiler that only pretends."""

import dataclasses
import importlib.util
import re
import subprocess
import sys

import jax
import pytest

from lin_jax.chips import GIB, chip_named
from lin_jax.experiment import (
    AugmentedConfig,
    BertConfig,
    ClassificationFinetuneConfig,
    Config,
    ConfigError,
    DataConfig,
    FinetuneConfig,
    LlamaConfig,
    LoraConfig,
    MeshConfig,
    Seq2seqFinetuneConfig,
    T5Config,
    TrainConfig,
)
from lin_jax.plan import cuda, fit, plan, search, targets
from lin_jax.plan.compiled import Step, TooLarge, _too_large
from lin_jax.plan.estimate import Activations
from lin_jax.plan.suggest import larger_topologies, smaller
from lin_jax.plan.times import bound
from lin_jax.train.collectives import Collective

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = LlamaConfig(
    vocabulary_size=64,
    width=32,
    depth=2,
    heads=2,
    key_value_heads=2,
    head_size=16,
    feed_forward_size=64,
    attention=AugmentedConfig(group_size=8, convolution=4),
)


def settings(**changes):
    given = {
        "model": MODEL,
        "data": DataConfig(sequence_length=16, batch_size=16),
        "train": TrainConfig(steps=10),
        "mesh": MeshConfig(data=1, fsdp=-1),
        "plan": "v5e:2x2",
    }
    return Config(**{**given, **changes})


@pytest.mark.parametrize("plan", ["cpu:8", "v5e:8x8", "v5p:4x4x4", "2*v5e:16x16", "h100:8", "a100-40g:16", ""])
def test_names_that_are_understood(plan):
    config = Config(plan=plan)
    if plan:
        numbers = map(int, re.findall(r"\d+", plan.partition(":")[2] + ("x2" if "*" in plan else "")))
        count = 1
        for number in numbers:
            count *= number
        assert targets.parse(config.plan).count == count


@pytest.mark.parametrize("plan", ["v5e", "v5e:8", "v9:2x2", "cpu:0", "2*h100:8", "h100:8x8", "cpu:-1"])
def test_names_that_are_not(plan):
    with pytest.raises(ConfigError, match=f"plan must look like .*, but is {re.escape(plan)}"):
        Config(plan=plan)


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"plan=v5e:2x2 .*pip install 'lin_jax\[tpu\]'"):
        targets.prepare(targets.parse("v5e:2x2"))


def test_times_are_those_of_the_slowest_part():
    chip = dataclasses.replace(chip_named("v5e"), flops=100.0, memory_bandwidth=10.0, interconnect=4.0, network=2.0)
    everyone, half = (tuple(range(8)),), ((0, 1, 2, 3), (4, 5, 6, 7))
    exchanges = [Collective("all-gather", 64, half, 3, ""), Collective("all-reduce", 64, everyone, 1, "")]
    times = bound(chip, 8, 4, flops=1600, traffic=30, collectives=exchanges)
    # Between two slices every device sums its quarter of 64 bytes with its counterpart: 16 bytes there, in two halves.
    assert times.network == 2 * 16 / 2 / 2.0
    assert times.interconnect == (3 * 48 + 2 * 56 - 16) / 4.0
    assert (times.compute, times.memory, times.step) == (2.0, 3.0, 60.0)


def test_a_compiler_that_runs_out_of_memory_is_understood():
    told = RuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
    )
    assert _too_large(told, GIB, 3.0) == TooLarge(int(20.5 * GIB), int(15.75 * GIB), 3.0)
    told = RuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.50G) exceeds "
        "available HBM (15.75G)."
    )
    assert _too_large(told, GIB, 3.0) == TooLarge(int(19.5 * GIB), int(15.75 * GIB), 3.0)
    with pytest.raises(RuntimeError, match="other"):
        _too_large(RuntimeError("something other"), GIB, 1.0)


@pytest.fixture
def fake_compiler(monkeypatch):
    """Compilers for chips of which the test says how much memory they have and what steps take of it."""
    tried = []

    def use(memory, temporaries):
        def compile_step(traced):
            tried.append(traced.parts.config)
            needed = temporaries(traced.parts.config)
            return TooLarge(needed, memory, 1.0) if needed > memory else Step(0, 0, needed, 0, [], [], 1.0)

        chip = dataclasses.replace(chip_named("v5e"), memory=memory)
        monkeypatch.setattr(targets, "chip_named", lambda name: chip)
        monkeypatch.setattr(targets, "devices", lambda target: jax.devices()[: target.count])
        monkeypatch.setattr(fit, "compile_step", compile_step)
        monkeypatch.setattr(search, "estimate_activations", lambda traced, flash: Activations(0, 0))
        return tried

    return use


def test_what_does_not_fit_is_told_with_settings_that_were_tried_and_do(fake_compiler):
    tried = fake_compiler(10**9, lambda config: 4 * 10**9 // config.train.microbatches)
    with pytest.raises(ConfigError) as error:
        plan(settings(model=dataclasses.replace(MODEL, remat="full")))
    assert "does not fit, 3.73 GiB of 0.93 GiB a device, 2.79 GiB too much" in str(error.value)
    assert "it does with --config.train.microbatches=4: 0.93 GiB" in str(error.value)
    assert "\n" not in str(error.value)
    assert [config.train.microbatches for config in tried] == [1, 2, 4]


def test_a_state_that_is_too_large_is_refused_without_compiling_and_gets_more_chips(fake_compiler):
    # 24,754 parameters in 16 bytes each are 99 KB on each of 4 devices, and 50 KB on each of 8.
    tried = fake_compiler(60_000, lambda config: 50_000)
    with pytest.raises(ConfigError) as error:
        plan(settings())
    assert "parameters, gradients and optimizer alone" in str(error.value)
    assert "it does with --config.plan=v5e:2x4 --config.mesh.data=1 --config.mesh.fsdp=-1: " in str(error.value)
    assert [config.plan for config in tried] == ["v5e:2x4"]


def test_suggestions_keep_earlier_changes_and_what_is_learned():
    config = settings(
        data=DataConfig(sequence_length=16, batch_size=16),
        mesh=MeshConfig(data=-1),
        finetune=FinetuneConfig(checkpoint="x", train=("norm",), lora=LoraConfig(rank=2)),
    )
    found = list(smaller(config, 4))
    assert found[0].settings == ("--config.model.remat=full",)
    last = found[-1]
    assert last.settings == (
        "--config.model.remat=full",
        "--config.finetune.frozen_dtype=bfloat16",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=-1",
        "--config.train.microbatches=4",
        "--config.train.loss_chunk=256",
        "--config.mesh.sequence=2",
        "--config.mesh.rules=width=fsdp+sequence",
    )
    assert last.config.finetune.lora == config.finetune.lora and last.config.data == config.data
    assert larger_topologies(chip_named("v5e"), 16)[:2] == ["v5e:4x8", "v5e:8x8"]


def test_gpus_without_a_compiler_are_planned_by_formula(monkeypatch):
    monkeypatch.setattr(cuda, "is_installed", lambda: False)
    told = dict(re.split(r"  +", line, maxsplit=1) for line in plan(settings(plan="h100:8")).splitlines()[1:])
    assert "fits (activations by formula, not compiled for the chip)" in told["altogether"]
    assert told["sent by all-gather"].endswith("exchanges") and "at 3350 GB/s" in told["time for memory"]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)")
def test_a_step_is_compiled_for_a_tpu_topology(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "from lin_jax.experiment import *\n\n\ndef get_config():\n"
        "    model = LlamaConfig(vocabulary_size=256, width=128, depth=2, heads=2, key_value_heads=2, head_size=64,\n"
        "                        feed_forward_size=256, attention=AugmentedConfig(group_size=64), dtype='bfloat16')\n"
        "    return Config(model=model, data=DataConfig(sequence_length=256, batch_size=4), mesh=MeshConfig(fsdp=4))\n"
    )
    command = [sys.executable, "train.py", "--config", str(file), "--config.plan=v5e:2x2"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "of 16.00 GiB a device: fits (compiled in" in told
    assert "sent by all-gather" in told and "MFU at most" in told


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {
                "model": BertConfig(vocabulary_size=64, width=16, depth=2, heads=2, feed_forward_size=32, positions=16),
                "data": DataConfig(source="glue", task="mnli", path=("absent",), sequence_length=16, batch_size=16),
                "finetune": ClassificationFinetuneConfig(),
            },
            # 82 rows of embeddings and a norm, 2 layers of 2,224 with 127 of their attention, pooler, 3 classes.
            "trained .* 6,369\n",
        ),
        (
            {
                "model": T5Config(
                    vocabulary_size=64, width=16, depth=2, encoder_depth=1, heads=2, head_size=8, feed_forward_size=32
                ),
                "data": DataConfig(
                    source="tfds", target_field="highlights", sequence_length=16, target_length=4, batch_size=16
                ),
                "finetune": Seq2seqFinetuneConfig(),
            },
            # 4 rows of 2 layers with 4 tokens and one with 16, of width 16 in float32.
            r"layer inputs kept for the backward pass +6,144 bytes",
        ),
    ],
    ids=["classification", "seq2seq"],
)
def test_the_data_need_not_be_there(changes, part):
    config = settings(**changes, plan="cpu:4", mesh=MeshConfig())
    assert re.search(part, plan(config))
