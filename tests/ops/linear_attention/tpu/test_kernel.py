"""The TPU kernel, simulated: what the shared tests of the op do not reach. And compiled, where libtpu is installed."""

import dataclasses
import functools
import importlib.util
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from lin_jax.ops.linear_attention import augmented_attention, select
from lin_jax.ops.linear_attention.tpu import kernel as pallas_tpu
from lin_jax.ops.linear_attention.tpu.blocks import table
from tests.ops.ahead import compile_ahead
from tests.ops.attention_cases import make_case, relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def blocks(monkeypatch):
    """Sets the block sizes of the simulated kernel."""

    def set_blocks(rows, heads):
        sizes = [{"value_size": 4096, "rows": rows, "heads": heads}]
        monkeypatch.setitem(table(), "cpu", {"vmem_mib": 1024, "forward": sizes, "backward": sizes})

    return set_blocks


def assert_equals_the_reference(case, tolerance=1e-4):
    actual, gradient = case.with_gradients("pallas_tpu")
    expected, expected_gradient = case.with_gradients("reference")
    assert relative_error(actual, expected) < 1e-5
    for name, x in expected_gradient.items():
        assert relative_error(gradient[name], x) < tolerance, name


@pytest.mark.parametrize(
    ("rows", "heads", "options"),
    [
        # Several groups in a block, several steps of heads.
        (16, 1, {"T": 37, "K": 3, "J": 1, "group_size": 4, "local_groups": 2, "taps": 9}),
        # A group over several blocks; the window is longer than a block.
        (
            8,
            4,
            {"T": 50, "B": 1, "K": 2, "J": 1, "group_size": 16, "local_groups": 2, "local": "softmax", "bias": True},
        ),
        # Neither divides the other; nothing before the block but what the group needs.
        (8, 2, {"T": 33, "B": 1, "J": 1, "group_size": 12, "taps": 0, "own_grouped": True, "local": "laplace"}),
        # Whole groups in blocks, no filter: the window is the block.
        (8, 2, {"T": 24, "group_size": 4, "taps": 0, "feature_map": "unit"}),
    ],
)
def test_blocks_and_groups_of_other_sizes(blocks, rows, heads, options):
    blocks(rows, heads)
    assert_equals_the_reference(make_case(11, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"segments": True},
        {"T": 29, "local": "softmax", "local_groups": 2, "own_grouped": True, "taps": 13, "feature_map": "elu1"},
    ],
)
@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_gradients_of_the_states(implementation, options):
    """Through the initial state to the final one."""
    case, before = make_case(3, B=2, J=1, **options), make_case(4, **{**options, "B": 2, "T": 11, "J": 1})
    ids = jnp.asarray([[2] * 7 + [0] * 4, [3] * 11], jnp.int32)
    _, state = before("reference", {**before.arrays, "segment_ids_BT": ids}, return_state=True)
    state_floats = {f"state.{name}": x for name, x in vars(state).items() if name != "length_B" and x is not None}
    floats = {**case.floats(), **state_floats}

    def run(implementation, floats):
        given = {name: x for name, x in floats.items() if name not in state_floats}
        initial = dataclasses.replace(state, **{name.removeprefix("state."): floats[name] for name in state_floats})
        more = {"initial_state": initial, "return_state": True, "implementation": implementation}
        y, final = augmented_attention(**{**case.arrays, **given}, **case.options, **more)
        return y, {name: x for name, x in vars(final).items() if name != "length_B" and x is not None}

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(implementation):
        out, pull = jax.vjp(functools.partial(run, implementation), floats)
        cotangent = jax.tree.map(lambda x: jnp.cos(3 * jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), out)
        return out, pull(cotangent)[0]

    actual, expected = with_gradients(implementation), with_gradients("reference")
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < 1e-4, path


@pytest.mark.parametrize(
    "options",
    [
        {"T": 19, "local": "laplace", "bias": True},
        {"T": 13, "segments": True, "local_groups": 2, "dtype": jnp.bfloat16},
    ],
)
def test_nothing_is_read_that_was_not_written(monkeypatch, options):
    """In the simulator of TPU memory, where what was never written is NaN."""
    monkeypatch.setattr(pallas_tpu, "SIMULATION", pltpu.InterpretParams(uninitialized_memory="nan"))
    case = make_case(6, B=1, K=1, J=1, **options)
    y, gradient = case.with_gradients("pallas_tpu") if "dtype" not in options else (case("pallas_tpu"), {})
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in jax.tree.leaves((y, gradient)))
    assert relative_error(y, case("reference")) < (1e-5 if gradient else 2e-2)


def test_under_transformations():
    """vmap, remat and scan of the kernel and of its gradient are those of the reference."""
    case = make_case(7, B=1, T=12, K=1, J=2)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -x]), case.floats())

    def loss(implementation, floats):
        return jnp.sum(jnp.sin(augmented_attention(**floats, **case.options, implementation=implementation)))

    def by_scan(implementation):
        body = jax.checkpoint(functools.partial(loss, implementation))
        return lambda stacked: jax.lax.scan(lambda total, x: (total + body(x), None), 0.0, stacked)[0]

    expected = jax.jit(jax.vmap(jax.grad(functools.partial(loss, "reference"))))(stacked)
    for gradient in (
        jax.vmap(jax.grad(functools.partial(loss, "pallas_tpu"))),
        jax.grad(by_scan("pallas_tpu")),
    ):
        actual = jax.jit(gradient)(stacked)
        for name, x in expected.items():
            assert relative_error(actual[name], x) < 1e-4, name


def test_under_shard_map():
    case = make_case(8, B=2, T=12, K=2, J=1, taps=3)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    tokens, heads = PartitionSpec("data", None, "tensor"), PartitionSpec("tensor")
    specs = {name: tokens if x.ndim == 4 else PartitionSpec(None, "tensor") for name, x in case.arrays.items()}
    specs["alpha"] = heads

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=tokens, check_vma=False)
    def sharded(arrays):
        return augmented_attention(**arrays, **case.options, implementation="pallas_tpu")

    def with_gradients(attend):
        return jax.jit(jax.value_and_grad(lambda arrays: jnp.sum(jnp.sin(attend(arrays)))))(case.arrays)

    actual, expected = with_gradients(sharded), with_gradients(lambda arrays: case("reference", arrays))
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < 1e-4, path


class TestChoice:
    def explained(self, monkeypatch, platform, kind, **options):
        monkeypatch.setattr(select, "target", lambda: select.TargetDevice(platform, kind))
        return make_case(0, **options).explained()

    def test_takes_the_kernel_on_a_tpu(self, monkeypatch):
        assert self.explained(monkeypatch, "tpu", "TPU v5 lite", D=128, E=128).implementation == "pallas_tpu"

    def test_takes_xla_elsewhere_and_says_why(self, monkeypatch, caplog):
        select._log_once.cache_clear()
        with caplog.at_level(logging.INFO):
            for _ in range(2):
                choice = self.explained(monkeypatch, "cpu", "cpu")
        assert choice == ("xla", "there is no kernel for cpu")
        assert [r.getMessage() for r in caplog.records].count(
            "augmented attention takes implementation xla: there is no kernel for cpu"
        ) == 1

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"causal": False}, "causal only"),
            ({"dtype": jnp.float16}, "all be float32 or all bfloat16, but are float16"),
            ({"E": 128, "D": 128, "T": 9000, "group_size": 9000, "B": 1, "J": 1, "taps": 0}, "MiB of vector memory"),
            ({"K": 40, "J": 1, "D": 6, "E": 6, "T": 2}, "cannot be cut in blocks of 128 lanes"),
        ],
    )
    def test_takes_xla_where_the_kernel_cannot_run(self, monkeypatch, options, reason):
        choice = self.explained(monkeypatch, "tpu", "TPU v4", **options)
        assert choice.implementation == "xla"
        assert reason in choice.reason

    def test_refuses_a_named_kernel_on_another_device(self, monkeypatch):
        monkeypatch.setattr(select, "target", lambda: select.TargetDevice("gpu", "NVIDIA H100"))
        with pytest.raises(ValueError, match="pallas_tpu cannot run: it needs a TPU, but the device is NVIDIA H100"):
            make_case(0)("pallas_tpu")


@pytest.mark.parametrize("target", ["v4", "v5e", "v5p", "v6e"])
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)")
class TestCompiled:
    def test_compiles_and_illegal_blocks_are_refused(self, target):
        found = compile_ahead(target, "--check")
        assert found["forward"] == found["backward"] == "compiled"
        assert "128" in found["half a tile of lanes"]
        assert "vmem" in found["more memory than it may use"].lower()

    def test_a_sharded_training_step_calls_all_passes(self, target):
        found = compile_ahead(target, "--train", "--implementations", "pallas_tpu")
        assert len(found) == 2
        for told in found.values():
            assert "MB a device, kernels ['forward', 'queries', 'keys']" in told
