"""How the scores of the same components differ between two attributions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.errors import DePassError


@dataclass(frozen=True)
class Comparison:
    """How one attribution differs from another over the same components.

    Attributes:
        cosine: cosine similarity of the two score vectors (0 where one of them is zero throughout).
        spearman: their rank correlation, ties averaged (0 where one of them is constant).
        gained: name, score before and score after of every component whose score rose, the largest first.
        lost: the same for every component whose score fell, the largest first.
    """

    cosine: float
    spearman: float
    gained: list[tuple[str, float, float]]
    lost: list[tuple[str, float, float]]


def compare_scores(
    names: Sequence[str],
    scores: Float[Tensor, " component"],
    other_names: Sequence[str],
    other_scores: Float[Tensor, " component"],
) -> Comparison:
    """Compare scores (before) with other scores (after), component by component.

    Raises:
        DePassError: the two are not over the same components.
    """
    if names != other_names:
        raise DePassError(
            "only attributions over the same components can be compared, but "
            + _first_difference(names, other_names)
        )
    before, after = scores.double(), other_scores.double()
    changes = sorted(
        zip(names, before.tolist(), after.tolist(), strict=True), key=lambda row: row[1] - row[2]
    )
    ranks_before, ranks_after = average_ranks(before), average_ranks(after)
    return Comparison(
        cosine=_cosine(before, after),
        spearman=_cosine(ranks_before - ranks_before.mean(), ranks_after - ranks_after.mean()),
        gained=[row for row in changes if row[2] > row[1]],
        lost=[row for row in reversed(changes) if row[2] < row[1]],
    )


def _first_difference(one: Sequence[str], other: Sequence[str]) -> str:
    """Describe the first difference of two lists of names."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return f"component {i} is {a!r} in one and {b!r} in the other"
    return f"one has {len(one)} and the other {len(other)}"


def _cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine of the angle between two vectors, 0 where one of them has no direction."""
    norms = (one.norm() * other.norm()).item()
    return (one @ other).item() / norms if norms else 0.0


def average_ranks(values: Float[Tensor, " item"]) -> Float[Tensor, " item"]:
    """Return ranks from 1 for the lowest, ties averaged."""
    _, group, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts - 1) / 2)[group]
