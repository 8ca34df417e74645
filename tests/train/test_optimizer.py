"""Learning rate schedules against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.experiment import OptimizerConfig
from lin_jax.train.optimizer import learning_rate_schedule, make_optimizer

PEAK, END, WARMUP, STEPS = 0.1, 0.01, 10, 50


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_schedules(schedule, warmup):
    config = OptimizerConfig(peak_learning_rate=PEAK, end_learning_rate=END, warmup_steps=warmup, schedule=schedule)

    def expected(step):
        if step < warmup:
            return PEAK * step / warmup
        part = (step - warmup) / (STEPS - warmup)
        return {
            "linear": PEAK + (END - PEAK) * part,
            "cosine": END + (PEAK - END) * (1 + math.cos(math.pi * part)) / 2,
            "constant": PEAK,
        }[schedule]

    function = learning_rate_schedule(config, STEPS)
    steps = range(STEPS + 1)
    np.testing.assert_allclose([function(step) for step in steps], [expected(step) for step in steps], rtol=1e-5)


def test_alpha_moves_at_its_own_rate():
    optimizer = make_optimizer(OptimizerConfig(peak_learning_rate=PEAK, schedule="constant", alpha_rate=0.1), 5, True)
    parameters = {"layers": {"mixing": {"alpha": jnp.ones(2), "filter": jnp.ones(2)}}}
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, parameters), optimizer.init(parameters), parameters)
    moved = updates["layers"]["mixing"]
    np.testing.assert_allclose(moved["alpha"], 0.1 * moved["filter"], rtol=1e-6)
    assert float(moved["filter"][0]) < -0.9 * PEAK  # the first step of Adam
