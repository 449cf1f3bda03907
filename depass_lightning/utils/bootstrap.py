"""Bootstrap confidence intervals of a mean over prompts, and tests of paired differences.

Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3: percentile intervals.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from depass_lightning.errors import DePassError

CHUNK = 1 << 22  # resampled values in memory at a time
EXACT = 12  # differences up to which all signs are tried


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


def sign_flip_test(differences: Sequence[float], *, draws: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p-value of a mean difference of zero, by flipping the differences' signs.

    All signs are tried where there are at most 12 differences that are not zero; else they are drawn, and the
    observed ones count among the draws (Phipson & Smyth, 2010), so that no p-value is below 1 / (draws + 1).

    Source: Fisher, "The Design of Experiments" (1935), section 21.

    Args:
        differences: one per prompt.
        draws: the number of drawn signs.
        seed: of the draws.

    Raises:
        DePassError: there are no differences, one of them is not finite, or there are no draws.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise DePassError("a test needs finite differences, one per prompt, and at least one")
    if draws < 1:
        raise DePassError(f"draws must be 1 or more; got {draws}")
    values = values[values != 0]
    if not values.size:
        return 1.0
    observed = abs(values.sum()) * (1 - 1e-12)  # the same sum in another order counts as the same
    if values.size <= EXACT:
        signs = 1 - 2 * (np.arange(2**values.size)[:, None] >> np.arange(values.size) & 1)
        return float((np.abs(signs @ values) >= observed).mean())
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // values.size)
    extreme = 0
    for start in range(0, draws, rows):
        signs = 1 - 2 * generator.integers(2, size=(min(rows, draws - start), values.size))
        extreme += int((np.abs(signs @ values) >= observed).sum())
    return (extreme + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, in the same order.

    Source: Holm, "A simple sequentially rejective multiple test procedure" (1979).

    Raises:
        DePassError: one of them is not between 0 and 1.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise DePassError(f"p-values are between 0 and 1; got {list(p_values)}")
    adjusted = [math.nan] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
