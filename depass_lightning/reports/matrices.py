"""Which prompts of a page are rows of one matrix, and what they need not repeat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Matrix:
    """Attributions of a page that are shown together.

    Attributes:
        name: what it is called.
        rows: which ones, `[first, end)`.
    """

    name: str
    rows: tuple[int, int]


def matrices_of(names: Sequence[str | None]) -> list[Matrix]:
    """Return the matrices of a page.

    Args:
        names: of each attribution the matrix that it is a row of; those of one matrix follow one another.
    """
    found, first = [], 0
    for name, rows in groupby(names):
        end = first + len(list(rows))
        if name is not None:
            found.append(Matrix(name, (first, end)))
        first = end
    return found


def shared_rows(prompts: Sequence[Mapping[str, Any]], matrices: Sequence[Matrix]) -> list[dict[str, Any]]:
    """Return a page's prompts with what a row has in common with its matrix's first left out.

    Args:
        prompts: what the page shows of each attribution.
        matrices: which of them belong together.
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
