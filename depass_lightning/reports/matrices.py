"""Prompts of a page that are the rows of one matrix, written without repetition."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Matrix:
    """Attributions of a page that are shown together.

    Attributes:
        name: the title.
        rows: the indices of the attributions, `[first, end)`.
    """

    name: str
    rows: tuple[int, int]


def matrices_of(names: Sequence[str | None]) -> list[Matrix]:
    """Return the matrices of a page.

    Args:
        names: the matrix of each attribution, None for none; rows of one matrix are consecutive.
    """
    matrices, first = [], 0
    for name, rows in groupby(names):
        end = first + len(list(rows))
        if name is not None:
            matrices.append(Matrix(name, (first, end)))
        first = end
    return matrices


def shared_rows(prompts: Sequence[Mapping[str, Any]], matrices: Sequence[Matrix]) -> list[dict[str, Any]]:
    """Return a page's prompts; a row leaves out what equals the first row of its matrix.

    Args:
        prompts: the page's data of each attribution.
        matrices: the page's matrices.
    """
    written = [dict(prompt) for prompt in prompts]
    for number, matrix in enumerate(matrices):
        first, end = matrix.rows
        written[first]["matrix"] = number
        for row in range(first + 1, end):
            views = {
                name: _less(view, prompts[first]["views"].get(name, {}))
                for name, view in prompts[row]["views"].items()
            }
            written[row] = _less(prompts[row], prompts[first]) | {"views": views, "like": first}
    return written


def _less(entries: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key not in known or known[key] != value}
