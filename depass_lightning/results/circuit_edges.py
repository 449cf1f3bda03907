"""One edge of a circuit, and how two circuits differ."""

from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from depass_lightning.results.component import Component

if TYPE_CHECKING:
    from depass_lightning.results.circuit import Circuit


class Edge(NamedTuple):
    """What one node contributes to the target directly through another.

    Attributes:
        source: the node that writes.
        reader: the node that reads.
        path: `value`; or `query` or `key` into a head, under a rule that separates them.
        score: the contribution, in logits.
    """

    source: Component
    reader: Component
    path: str
    score: float


@dataclass(frozen=True)
class CircuitComparison:
    """How a circuit differs from another with the same nodes, such as that of a later checkpoint.

    Attributes:
        difference: the other circuit's scores and edges less this one's.
        overlap: the fraction of the largest edges of either circuit that are among the largest of both.
        appeared: the edges that are among the largest only in the other circuit, the largest first.
        vanished: the edges that are among the largest only in this one.
    """

    difference: "Circuit"
    overlap: float
    appeared: list[Edge]
    vanished: list[Edge]


def overlap(before: Set[Any], after: Set[Any]) -> float:
    """Return the fraction of the edges of either set that are in both; 1 if there are none."""
    either = before | after
    return len(before & after) / len(either) if either else 1.0
