"""Processes that are really killed; `python -m benchmarks.resume --kills 20` is the long version."""

import pytest

from benchmarks.resume import Experiment, compare, killed_ending, steps_for

KILLS = 2


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return Experiment(tmp_path_factory.mktemp("resume"), steps_for(KILLS))


@pytest.fixture(scope="module")
def whole(experiment):
    return experiment.finish("whole", 1)


def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(experiment, whole):
    *_, killed = killed_ending(experiment, KILLS, [1], seed=1)
    assert compare(killed, whole, exact=True) == "bit for bit"
    steps = [line[0] for line in whole.lines if line[1] is not None]
    assert steps == list(range(1, experiment.steps + 1))
