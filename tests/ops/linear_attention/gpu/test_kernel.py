"""The GPU kernels, simulated: what the shared tests of the op do not reach; and compiled, where the compiler is."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from lin_jax.ops.linear_attention import augmented_attention, select
from lin_jax.ops.linear_attention.arguments import AttentionArrays, AttentionOptions
from lin_jax.ops.linear_attention.gpu import blocks as gpu_plan
from lin_jax.ops.linear_attention.inputs import make_inputs
from lin_jax.plan import cuda
from tests.ops.ahead import compile_ahead
from tests.ops.attention_cases import make_case, relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")


def assert_equals_the_reference(case, tolerance=1e-4):
    actual, gradient = case.with_gradients("pallas_gpu")
    expected, expected_gradient = case.with_gradients("reference")
    assert relative_error(actual, expected) < 1e-5
    for name, x in expected_gradient.items():
        assert relative_error(gradient[name], x) < tolerance, name


@pytest.mark.parametrize(
    "options",
    [
        # A group of several blocks, several parts of the row, value tiles, a filter longer than a block.
        {
            "T": 150,
            "B": 1,
            "K": 1,
            "J": 1,
            "D": 5,
            "E": 40,
            "group_size": 32,
            "taps": 20,
            "own_grouped": True,
            "bias": True,
        },
        # Several groups in a block, several parts of the row, segments over their borders, shared keys.
        {"T": 150, "B": 1, "K": 1, "J": 2, "group_size": 8, "taps": 13, "segments": True, "normalise": True},
        # Softmax over a window that begins before the row, in value tiles; a group is a block.
        {
            "T": 40,
            "B": 1,
            "K": 1,
            "J": 1,
            "E": 20,
            "group_size": 16,
            "local_groups": 2,
            "local": "softmax",
            "bias": True,
        },
        # Neither group nor block divides the other.
        {
            "T": 50,
            "B": 1,
            "K": 1,
            "J": 3,
            "group_size": 12,
            "taps": 0,
            "own_grouped": True,
            "local": "laplace",
            "feature_map": "elu1",
        },
        # A filter that reaches blocks whose keys are in the state already: aligned, and with segments.
        {"T": 65, "B": 1, "K": 1, "J": 1, "group_size": 16, "taps": 40},
        {"T": 65, "B": 1, "K": 1, "J": 2, "group_size": 8, "taps": 40, "local": "softmax", "segments": True},
    ],
)
def test_blocks_parts_and_tiles(options):
    assert_equals_the_reference(make_case(11, **options))


def test_bfloat16_without_what_was_never_written():
    """Memory beyond the arrays' ends and unwritten outputs are NaN in the simulation."""
    case = make_case(2, B=1, T=70, K=1, J=1, D=20, E=24, group_size=16, dtype=jnp.bfloat16)
    wide = {k: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for k, x in case.arrays.items()}
    actual, expected = case("pallas_gpu"), case("reference", wide)
    assert actual.dtype == jnp.bfloat16
    assert relative_error(actual, expected) < 1e-2


def test_under_transformations():
    """vmap, remat and scan of the kernels and of their gradients are those of the reference."""
    case = make_case(7, B=1, T=12, K=1, J=1)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), case.floats())

    def loss(implementation, floats):
        return jnp.sum(jnp.sin(augmented_attention(**floats, **case.options, implementation=implementation)))

    def by_scan(implementation):
        body = jax.checkpoint(functools.partial(loss, implementation))
        return lambda stacked: jax.lax.scan(lambda total, x: (total + body(x), None), 0.0, stacked)[0]

    expected = jax.jit(jax.vmap(jax.grad(functools.partial(loss, "reference"))))(stacked)
    for gradient in (jax.vmap(jax.grad(functools.partial(loss, "pallas_gpu"))), jax.grad(by_scan("pallas_gpu"))):
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
        return augmented_attention(**arrays, **case.options, implementation="pallas_gpu")

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(function, arrays):
        y, pull = jax.vjp(function, arrays)
        return y, pull(jnp.cos(y))[0]

    actual = with_gradients(sharded, case.arrays)
    expected = with_gradients(functools.partial(case, "reference"), case.arrays)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < 1e-4, path


class TestPlan:
    def forward(self, B, T, heads, E, group_size, device="NVIDIA H100 80GB HBM3"):
        found = []

        def attend(q, k, v):
            inputs = make_inputs(AttentionArrays(q, k, v), AttentionOptions(group_size=group_size))
            found.append(gpu_plan.make_plans(inputs, device).forward)

        tokens = lambda size: jax.ShapeDtypeStruct((B, T, heads, size), jnp.bfloat16)  # noqa: E731
        jax.eval_shape(attend, tokens(128), tokens(128), tokens(E))
        return found[0]

    def test_one_part_where_heads_fill_the_chip(self):
        assert self.forward(4, 4096, 32, 128, 64).parts(32) == 1

    def test_parts_fill_the_chip_where_states_are_small_beside_tokens(self):
        plan = self.forward(1, 32768, 32, 128, 64)
        assert 32 * plan.tiles * plan.parts(32) >= 132

    def test_states_stay_small_beside_few_tokens(self):
        assert self.forward(1, 1024, 1, 1536, 256).parts(1) == 1


class TestChoice:
    def explained(self, monkeypatch, **options):
        monkeypatch.setattr(select, "target", lambda: select.TargetDevice("gpu", "NVIDIA H100 80GB HBM3"))
        return make_case(0, **options).explained()

    def test_takes_the_kernel_on_a_gpu(self, monkeypatch):
        assert self.explained(monkeypatch).implementation == "pallas_gpu"

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"causal": False}, "causal only"),
            ({"T": 2, "D": 300}, "at most 256 channels, not 300"),
            ({"T": 2, "group_size": 2048, "taps": 0}, "at most 1024 slots"),
        ],
    )
    def test_takes_xla_where_the_kernel_cannot_run(self, monkeypatch, options, reason):
        choice = self.explained(monkeypatch, **options)
        assert choice.implementation == "xla"
        assert reason in choice.reason

    def test_refuses_a_named_kernel_on_another_device(self, monkeypatch):
        monkeypatch.setattr(select, "target", lambda: select.TargetDevice("tpu", "TPU v4"))
        with pytest.raises(ValueError, match="pallas_gpu cannot run: it needs a GPU, but the device is TPU v4"):
            make_case(0)("pallas_gpu")


@pytest.mark.skipif(not cuda.is_installed(), reason="jax-cuda12-plugin and jax-cuda12-pjrt are not installed")
@pytest.mark.parametrize("target", ["a100", "h100"])
def test_compiles_for_a_gpu_and_blocks_that_do_not_fit_are_refused(target):
    found = compile_ahead(target, "--check")
    assert found["forward"] == found["backward"] == "compiled"
    assert "Shared memory size limit exceeded" in found["more memory than it may use"]
