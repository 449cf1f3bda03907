"""How far a mean over prompts may be off: intervals by drawing the prompts anew.

Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3: percentile intervals.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from depass_lightning.errors import DePassError

CHUNK = 1 << 22  # how many drawn values are held at once


@dataclass(frozen=True)
class Interval:
    """A mean over prompts, and between what bounds it lies.

    Attributes:
        value: the mean.
        low: the interval's lower end.
        high: its upper end.
    """

    value: float
    low: float
    high: float


def bootstrap(values: Sequence[float], *, draws: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the mean of values and its percentile interval over prompts drawn with replacement.

    Methods that are given their prompts in one order and the same seed are drawn the same prompts, so the
    interval of a difference is `bootstrap` of the differences.

    Args:
        values: one a prompt.
        draws: how many times as many prompts are drawn.
        level: the share of the draws' means that the interval holds, between 0 and 1.
        seed: of the draws.

    Raises:
        DePassError: there are no values, one of them is not finite, or a setting is out of range.
    """
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or not given.size or not np.isfinite(given).all():
        raise DePassError("an interval needs finite values, one a prompt, and at least one")
    if draws < 1 or not 0 < level < 1:
        raise DePassError(f"draws must be 1 or more and level between 0 and 1; got {draws} and {level}")
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // given.size)
    means = np.concatenate(
        [
            given[generator.integers(given.size, size=(min(rows, draws - start), given.size))].mean(1)
            for start in range(0, draws, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(math.fsum(given) / given.size, float(low), float(high))
