"""One edge of a circuit, and how two circuits differ."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from depass_lightning.results.component import Component

if TYPE_CHECKING:
    from depass_lightning.results.circuit import Circuit


class Edge(NamedTuple):
    """What one node contributes to the target through another at once.

    Attributes:
        source: the node that writes.
        reader: the node that reads.
        path: `value`; or `query` or `key` into a head, under a rule that keeps them apart.
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
        difference: the other's scores and edges less this one's.
        overlap: of the edges with the largest scores in either, the fraction that both have there.
        appeared: the edges that only the other has among its largest, the largest first.
        vanished: the edges that only this one has there.
    """

    difference: "Circuit"
    overlap: float
    appeared: list[Edge]
    vanished: list[Edge]
