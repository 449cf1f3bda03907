"""Tests of paired differences, corrected for their number."""

import math
from collections.abc import Sequence

import numpy as np

from depass_lightning.errors import DePassError
from depass_lightning.utils.bootstrap import CHUNK

EXACT = 12  # differences up to which all signs are tried


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
