"""The training step: same loss and gradient on every mesh and for every number of microbatches; bad steps skipped."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lin_jax.experiment import Config, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from lin_jax.models.structure import make_structure
from lin_jax.tasks.language_model import LanguageModelling
from lin_jax.tasks.loss import LossSums
from lin_jax.train.optimizer import learning_rate_schedule, make_optimizer
from lin_jax.train.sharding import batch_sharding, batch_shardings, make_partition
from lin_jax.train.state import initial_state, state_shardings
from lin_jax.train.step import gradient_sums, make_evaluation_step, make_train_step

from .stub import LAYERS, VOCABULARY, WIDTH, Stub

STRUCTURE = make_structure(Stub)
CONFIG = OptimizerConfig(peak_learning_rate=1e-2, schedule="constant", weight_decay=0.1, gradient_clip=0.5, z_loss=1e-3)
TASK = LanguageModelling(
    Config(
        data=DataConfig(batch_size=16, sequence_length=12, packing="segments"),
        optimizer=CONFIG,
        train=TrainConfig(loss_chunk=16),
    )
)


def make_batch(rows=16, length=12, seed=0):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCABULARY, (rows, length), dtype=np.int32)
    lengths = random.integers(2, length + 1, (rows, 1))
    real = np.arange(length)[None] < lengths
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": real.astype(np.int32),
        "weights": (real * random.random((rows, length))).astype(np.float32),
    }


def plain_loss(parameters, constants, batch):
    logits = STRUCTURE.merge(parameters, constants)(batch["tokens"], batch["segment_ids"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    losses = losses + CONFIG.z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])


def setup(partition, microbatches=1, config=CONFIG):
    optimizer = make_optimizer(config, 10, STRUCTURE.metadata("decay"))
    shardings = state_shardings(STRUCTURE, optimizer, partition)
    state = jax.jit(lambda seed: initial_state(STRUCTURE, optimizer, seed), out_shardings=shardings)(jnp.uint32(0))
    schedule = learning_rate_schedule(config, 10)
    loss, of_batch = TASK.loss(STRUCTURE, partition), batch_shardings(partition, TASK.batch_fields())
    step = make_train_step(loss, optimizer, schedule, microbatches, shardings, of_batch, partition)
    return state, step, shardings


@pytest.mark.parametrize("microbatches", [1, 2, 8])
def test_gradient_is_that_of_the_plain_loss(microbatches):
    partition = make_partition(MeshConfig(), jax.devices()[:1])
    parameters, constants = STRUCTURE.initialise(jnp.uint32(0))
    batch = jax.tree.map(jnp.asarray, make_batch())

    def loss(parameters, part, key):
        return TASK.loss(STRUCTURE, partition)(parameters, {}, constants, part, key)

    sums, gradient = jax.jit(lambda p, b: gradient_sums(loss, p, b, microbatches))(parameters, batch)
    value, expected = jax.jit(jax.value_and_grad(plain_loss))(parameters, constants, batch)
    np.testing.assert_allclose(sums.loss / sums.weight, value, rtol=1e-6)

    def compare(found, truth):
        # Sums in another order: entries are as exact as the largest one allows (1.4e-6 of it, with jax 0.12).
        np.testing.assert_allclose(found / sums.weight, truth, rtol=0, atol=3e-6 * np.abs(truth).max())

    jax.tree.map(compare, gradient, expected)


def test_every_microbatch_of_every_step_has_a_key_of_its_own_for_dropout():
    # A loss that is the key's random number times the parameter: its gradient tells which keys were used.
    def loss(parameters, part, key):
        value = jax.random.uniform(key) * parameters
        return LossSums(value, value, jnp.ones(()))

    def used(key):
        return float(gradient_sums(loss, jnp.ones(()), jnp.zeros((4, 1)), 4, key)[1])

    keys = [jax.random.fold_in(jax.random.key(0), step) for step in range(2)]
    expected = [sum(float(jax.random.uniform(jax.random.fold_in(key, part))) for part in range(4)) for key in keys]
    np.testing.assert_allclose([used(key) for key in keys], expected, rtol=1e-6)
    assert used(keys[0]) == used(keys[0]) != used(keys[1])


@functools.cache
def run_steps(mesh_config, devices, microbatches):
    partition = make_partition(mesh_config, jax.devices()[:devices])
    state, step, _ = setup(partition, microbatches)
    losses = []
    for seed in range(3):
        state, metrics = step(state, jax.device_put(make_batch(seed=seed), batch_sharding(partition)))
        losses.append((float(metrics.loss), float(metrics.gradient_norm)))
    return losses, jax.device_get(state.parameters)


@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [
        (MeshConfig(data=8), 1),
        (MeshConfig(data=1, fsdp=8), 1),
        (MeshConfig(data=2, fsdp=4), 1),
        (MeshConfig(data=2, fsdp=4), 2),
    ],
)
def test_every_mesh_gives_the_same_run(mesh, microbatches):
    losses, parameters = run_steps(mesh, 8, microbatches)
    expected_losses, expected = run_steps(MeshConfig(), 1, 1)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), parameters, expected)


def test_only_parameters_cross_devices():
    """No activation is gathered or summed over devices; layers are gathered one at a time."""
    partition = make_partition(MeshConfig(data=2, fsdp=4))
    state, step, _ = setup(partition)
    rows, length = 40, 11  # sizes that no parameter has
    text = step.lower(state, jax.device_put(make_batch(rows, length), batch_sharding(partition))).compile().as_text()
    pattern = r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
    shapes = [
        [int(size) for size in dimensions.split(",") if size]
        for result in re.findall(pattern, text)
        for dimensions in re.findall(r"\[([\d,]*)\]", result)
    ]
    assert [WIDTH, 2 * WIDTH] in shapes and len(shapes) > 5
    assert not [shape for shape in shapes if length in shape or rows in shape]


def test_parameters_and_moments_are_cut_alike():
    partition = make_partition(MeshConfig(data=2, fsdp=4))
    state, _, shardings = setup(partition)
    assert state.parameters["embedding"].addressable_shards[0].data.shape == (VOCABULARY, 4)
    assert state.parameters["layers"]["up"].addressable_shards[0].data.shape == (LAYERS, 4, 32)
    mean = optax.tree_utils.tree_get(state.optimizer, "mu")
    jax.tree.map(lambda m, p: None if m.sharding == p.sharding else pytest.fail("cut apart"), mean, state.parameters)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)


def test_update_is_adamw_with_masked_decay():
    partition = make_partition(MeshConfig(), jax.devices()[:1])
    state, step, _ = setup(partition)
    before = jax.device_get(state.parameters)
    batch = make_batch()
    _, gradient = jax.jit(jax.value_and_grad(plain_loss))(before, jax.device_get(state.constants), batch)
    after, metrics = step(state, jax.device_put(batch, batch_sharding(partition)))
    norm = optax.tree.norm(gradient)
    np.testing.assert_allclose(metrics.gradient_norm, norm, rtol=1e-5)
    clip = min(1.0, CONFIG.gradient_clip / float(norm))

    def expected(parameter, slope, decay):
        # The first step of Adam: both corrected means are the gradient itself.
        slope = slope * clip
        update = slope / (np.abs(slope) + CONFIG.epsilon) + CONFIG.weight_decay * decay * parameter
        return parameter - CONFIG.peak_learning_rate * update

    decay = {"embedding": False, "layers": {"up": True, "down": True, "scale": False}}
    assert STRUCTURE.metadata("decay") == decay
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        jax.device_get(after.parameters),
        jax.tree.map(expected, before, jax.device_get(gradient), decay),
    )
    np.testing.assert_array_equal(after.constants["temperature"], 0.5)


def test_non_finite_steps_are_skipped_and_counted():
    partition = make_partition(MeshConfig(data=2, fsdp=4))
    state, step, _ = setup(partition)
    state, _ = step(state, jax.device_put(make_batch(), batch_sharding(partition)))
    before = jax.device_get((state.parameters, state.optimizer.inner_state))
    bad = make_batch(seed=1)
    bad["weights"][3, 1] = np.inf
    counts = []
    for batch in (bad, bad, make_batch(seed=2)):
        state, metrics = step(state, jax.device_put(batch, batch_sharding(partition)))
        counts.append((int(metrics.skipped_in_a_row), int(metrics.skipped), int(state.step)))
        if batch is bad:
            after = jax.device_get((state.parameters, state.optimizer.inner_state))
            jax.tree.map(np.testing.assert_array_equal, before, after)
    assert counts == [(1, 1, 2), (2, 2, 3), (0, 2, 4)]
    assert np.isfinite(jax.device_get(metrics.loss)) and not np.array_equal(
        after[0]["embedding"], jax.device_get(state.parameters["embedding"])
    )


def test_a_batch_without_weight_leaves_no_nan():
    partition = make_partition(MeshConfig(), jax.devices()[:1])
    state, step, _ = setup(partition)
    batch = make_batch()
    batch["weights"][:] = 0
    state, metrics = step(state, jax.device_put(batch, batch_sharding(partition)))
    assert float(metrics.loss) == 0 and int(metrics.skipped) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.parameters)))


def test_evaluation_leaves_out_the_z_loss():
    partition = make_partition(MeshConfig(data=2, fsdp=4))
    state, _, shardings = setup(partition)
    batch = make_batch()
    evaluation, of_batch = TASK.evaluation(STRUCTURE, partition), batch_shardings(partition, TASK.batch_fields())
    sums = make_evaluation_step(evaluation, shardings, of_batch, partition)(
        state.parameters, state.frozen, state.constants, jax.device_put(batch, batch_sharding(partition))
    )
    logits = STRUCTURE.merge(jax.device_get(state.parameters), jax.device_get(state.constants))(
        batch["tokens"], batch["segment_ids"]
    )
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    np.testing.assert_allclose(sums.nll, np.sum(nll * batch["weights"]), rtol=1e-5)
    assert float(sums.loss) == float(sums.nll)
