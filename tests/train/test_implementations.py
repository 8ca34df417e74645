"""Training through a kernel is training through XLA's form; `benchmarks.implementations` compares more models."""

import numpy as np
import pytest

from benchmarks.implementations import losses

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_twenty_steps_have_the_losses_of_xla():
    expected = losses("flash", "xla")
    assert expected[-1] < expected[0] - 0.1
    for implementation in ("pallas_tpu", "pallas_gpu"):
        np.testing.assert_allclose(losses("flash", implementation), expected, rtol=1e-5)
