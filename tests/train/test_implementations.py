"""Training through a kernel is training through XLA's form; `benchmarks.implementations` compares more models."""

import numpy as np
import pytest

from benchmarks.implementations import losses

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_twenty_steps_have_the_losses_of_xla(implementation):
    expected = losses("flash", "xla")
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(losses("flash", implementation), expected, rtol=1e-5)
