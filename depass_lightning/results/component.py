"""What one component of a decomposed state is, and the states of all of them at one layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jaxtyping import Float
from torch import Tensor

from depass_lightning.errors import DePassError

COLUMNS = ("kinds", "names", "layers", "indices", "positions")


@dataclass(frozen=True, slots=True)
class Component:
    """One component of a decomposed state.

    Attributes:
        kind: `token`, `span`, `head`, `neuron`, `attention`, `mixer`, `mlp`, `subspace`, or `component` for
            one of a user's tensor; `state` for the rest of the state next to heads, modules or neurons;
            `rest` for what subspaces or spans leave out; `chosen` and `rejected` for the tokens of two
            compared answers; `bias` and `rounding` for constants; `others` for a sum of components that are
            not listed one by one.
        label: its name: a token's text, "head 3", "layer 2 neuron 7".
        layer: the block in which it is computed; None for positions, directions and a user's components.
        index: its index among the components of its kind: the head, the neuron, the subspace.
        span: the token range [start, end) of the text; None for components that are not in the text.
    """

    kind: str
    label: str
    layer: int | None = None
    index: int | None = None
    span: tuple[int, int] | None = None

    @property
    def column(self) -> str:
        """The label without the layer: "head 3", "state", "bias"."""
        return self.kind if self.index is None else f"{self.kind} {self.index}"

    @property
    def remainder(self) -> bool:
        """Whether this is a remainder: the state next to heads or neurons, a bias, or a sum of others."""
        return self.kind in ("state", "bias", "others")


@dataclass(frozen=True)
class Decomposition:
    """Every component's state at one layer.

    Attributes:
        states: `[component, position, hidden]`; within each group they sum to the model's residual stream.
        components: what each state belongs to.
        layer: the block whose input this is; the number of blocks for the last block's output.
    """

    states: Float[Tensor, "component position hidden"]
    components: list[Component]
    layer: int

    @property
    def names(self) -> list[str]:
        """The components' labels."""
        return [component.label for component in self.components]


def constant(kind: str, layer: int | None = None) -> Component:
    """Return the component of constants (`bias`) or of rounding (`rounding`).

    Args:
        kind: which of the two.
        layer: the block of its group, where several blocks have one each.
    """
    return Component(kind, kind if layer is None else f"layer {layer} {kind}", layer)


@lru_cache(maxsize=4)
def block_components(
    layers: tuple[int, ...], kind: str, indices: Sequence[int] | None
) -> list[list[Component]]:
    """Return the rest of the state and the components of one kind, for each of some blocks.

    They are the same for every prompt, and may be hundreds of thousands: they are made once and shared.

    Args:
        layers: the blocks; where there are several, labels begin with the layer.
        kind: of the components.
        indices: the components' indices, as a range or a tuple; None for one component without an index.

    Returns:
        `[layer][component]`, not to be changed.
    """
    groups = []
    for layer in layers:
        prefix = f"layer {layer} " if len(layers) > 1 else ""
        if indices is None:
            members = [Component(kind, prefix + kind, layer)]
        else:
            members = [Component(kind, f"{prefix}{kind} {index}", layer, index) for index in indices]
        groups.append([Component("state", f"{prefix}state", layer), *members])
    return groups


def to_columns(components: Sequence[Component]) -> dict[str, list[Any]]:
    """Return the components' fields as columns for a file, by the names in `COLUMNS`."""
    return {
        "kinds": [component.kind for component in components],
        "names": [component.label for component in components],
        "layers": [component.layer for component in components],
        "indices": [component.index for component in components],
        "positions": [component.span for component in components],
    }


def from_columns(columns: Mapping[str, Any]) -> list[Component]:
    """Return the components that `to_columns` wrote.

    Args:
        columns: a mapping that holds the columns, such as a row of a table.

    Raises:
        DePassError: a column is missing: an earlier version wrote names alone.
    """
    missing = [name for name in COLUMNS if columns.get(name) is None]
    if missing:
        raise DePassError(
            f"there is no {missing[0]!r} of the components: an earlier version wrote this file; run what "
            "wrote it again"
        )
    spans = tuple(None if span is None else tuple(span) for span in columns["positions"])
    return list(_components(*(tuple(columns[name]) for name in COLUMNS[:-1]), spans))


@lru_cache(maxsize=1)  # the rows of a run have the same heads or neurons, one after another
def _components(*columns: tuple[Any, ...]) -> list[Component]:
    return [Component(*values) for values in zip(*columns, strict=True)]
