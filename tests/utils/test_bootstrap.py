"""Intervals by the bootstrap, against what theory says of them."""

import math
import sys

import numpy as np
import pytest

from depass_lightning.errors import DePassError
from depass_lightning.utils.bootstrap import Interval, bootstrap


def test_an_interval_is_as_wide_as_the_normal_one():
    values = np.random.default_rng(1).normal(3, 2, 400)
    interval = bootstrap(values.tolist(), draws=4000)
    width = 1.96 * values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.value == pytest.approx(width, rel=0.1)
    assert interval.value - interval.low == pytest.approx(width, rel=0.1)


def test_it_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(2)
    inside = 0
    for seed in range(200):
        interval = bootstrap(generator.exponential(size=50).tolist(), draws=300, level=0.8, seed=seed)
        inside += interval.low <= 1 <= interval.high
    assert 0.7 < inside / 200 < 0.87


def test_constant_values_leave_no_doubt():
    assert bootstrap([0.25] * 7) == Interval(0.25, 0.25, 0.25)
    assert bootstrap([1.0]) == Interval(1.0, 1.0, 1.0)


def test_draws_come_from_the_seed_and_not_from_the_chunks(monkeypatch):
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.5]
    first = bootstrap(values, seed=5)
    assert bootstrap(values, seed=5) == first
    assert bootstrap(values, seed=6) != first
    # The function has the module's name in the package.
    monkeypatch.setattr(sys.modules[bootstrap.__module__], "CHUNK", 30)
    assert bootstrap(values, seed=5) == first


@pytest.mark.parametrize(
    ("values", "options"),
    [([], {}), ([1.0, math.nan], {}), ([1.0], {"draws": 0}), ([1.0], {"level": 1.0})],
)
def test_what_gives_no_interval_is_refused(values, options):
    with pytest.raises(DePassError):
        bootstrap(values, **options)
