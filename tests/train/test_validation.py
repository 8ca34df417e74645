"""Sums over a validation set: of all its batches, exact, and no more of them than asked for."""

import numpy as np

from lin_jax.train.validation import _add_up


def test_sums_are_exact_where_those_of_float32_are_not():
    """2**24 + 1 is no float32; sums keep the form of what is added up."""
    big, one = np.float32(2**24), np.float32(1)
    trees = [{"n": big, "table": np.array([[big, one]])}, {"n": one, "table": np.array([[one, one]])}]
    found = _add_up([*trees, {"n": one, "table": np.zeros((1, 2), np.float32)}])
    assert found["n"] == 2**24 + 2
    np.testing.assert_array_equal(found["table"], [[2**24 + 1, 2]])
