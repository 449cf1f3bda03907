"""Bootstrap confidence intervals of a mean over prompts.

Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3: percentile intervals.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from depass_lightning.errors import DePassError

CHUNK = 1 << 22  # resampled values in memory at a time


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with its confidence interval.

    Attributes:
        value: the mean.
        low: the lower end of the interval.
        high: the upper end of the interval.
    """

    value: float
    low: float
    high: float


def bootstrap(values: Sequence[float], *, draws: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the mean of values and its bootstrap percentile interval over prompts.

    With the same seed and order of prompts, the same prompts are drawn for every method, so the interval of a
    difference is `bootstrap` of the differences.

    Args:
        values: one value per prompt.
        draws: the number of bootstrap samples.
        level: the confidence level, between 0 and 1.
        seed: the seed of the draws.

    Raises:
        DePassError: there are no values, one of them is not finite, or a setting is out of range.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not sample.size or not np.isfinite(sample).all():
        raise DePassError("an interval needs finite values, one per prompt, and at least one")
    if draws < 1 or not 0 < level < 1:
        raise DePassError(f"draws must be 1 or more and level between 0 and 1; got {draws} and {level}")
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // sample.size)
    means = np.concatenate(
        [
            sample[generator.integers(sample.size, size=(min(rows, draws - start), sample.size))].mean(1)
            for start in range(0, draws, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(math.fsum(sample) / sample.size, float(low), float(high))
