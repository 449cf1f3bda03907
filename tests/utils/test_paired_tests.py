"""Sign flips and Holm's correction, against counting and textbook numbers."""

import itertools

import pytest

from depass_lightning.errors import DePassError
from depass_lightning.utils.bootstrap import holm, sign_flip_test


def test_few_differences_are_tried_with_all_signs() -> None:
    values = [0.5, -0.25, 1.0, 0.75, 0.0]
    sums = [abs(sum(a * b for a, b in zip(values, signs, strict=True))) for signs in SIGNS]
    assert sign_flip_test(values) == sum(total >= 2.0 for total in sums) / len(sums)
    assert sign_flip_test([1.0] * 5) == 2 / 2**5
    assert sign_flip_test([0.0, 0.0]) == 1.0


SIGNS = list(itertools.product([1, -1], repeat=5))


def test_many_differences_are_drawn() -> None:
    """Near the exact value of the sign test, where all differences are of one size: 15 of 20 are positive."""
    values = [1.0] * 15 + [-1.0] * 5
    exact = 0.04138947  # two-sided binomial
    assert sign_flip_test(values, draws=20_000) == pytest.approx(exact, abs=0.006)
    assert sign_flip_test(values, seed=1) == sign_flip_test(values, seed=1)
    assert sign_flip_test([1.0] * 40, draws=999) == 1 / 1000


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_cannot_be_tested_is_refused() -> None:
    for values in ([], [float("nan")]):
        with pytest.raises(DePassError, match="finite differences"):
            sign_flip_test(values)
    with pytest.raises(DePassError, match="draws"):
        sign_flip_test([1.0], draws=0)
    with pytest.raises(DePassError, match="between 0 and 1"):
        holm([1.5])
