"""What a picture must know of components that are no places in the text, such as heads and neurons."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from depass_lightning.results.attribution import Attribution
from depass_lightning.results.component import Component

WIDEST = 102  # columns of a map; what has more, such as neurons, is a list
LISTED = 60  # components of a long list that are kept one by one


@dataclass(frozen=True)
class Grid:
    """How the components of all layers stand in rows: component i is row i // width, column i % width.

    Attributes:
        layers: each row's layer.
        columns: each column's name: "head 3", "state".
        cells: the columns that were asked for.
        remainders: the columns that hold what is left of the state.
    """

    layers: tuple[int, ...]
    columns: tuple[str, ...]
    cells: list[int]
    remainders: list[int]


def grid_of(attribution: Attribution) -> Grid | None:
    """Return how the components stand in layers, or None where they do not, or are too many to draw."""
    width = len(attribution) // attribution.groups
    if attribution.groups < 2 or width > WIDEST:
        return None
    components = attribution.components
    layers = tuple(component.layer for component in components[::width] if component.layer is not None)
    columns = tuple(component.column for component in components[:width])
    places = [(component.layer, component.column) for component in components]
    cells = [i for i in range(width) if not components[i].remainder]
    if places != [(layer, column) for layer in layers for column in columns] or not cells:
        return None
    return Grid(layers, columns, cells, [i for i in range(width) if i not in cells])


def placed(attribution: Attribution) -> bool:
    """Say whether any component stands for a place in the text."""
    return any(span is not None for span in attribution.positions)


def complete(attribution: Attribution) -> bool:
    """Say whether the scores ought to sum to the value: those of control paths, a part of it, do not, nor do
    those of other methods."""
    return attribution.attention_path == "content" and attribution.method == "depass"


def remainders_of(attribution: Attribution) -> list[int]:
    """Return the components that are what is left of a state: larger than all, and not what was asked for.

    Beside components of the text there are none: a bias is listed with them.
    """
    if placed(attribution):
        return []
    remainders = [i for i, component in enumerate(attribution.components) if component.remainder]
    return remainders if len(remainders) < len(attribution) else []


def asked_for(attribution: Attribution) -> Attribution:
    """Return the attribution less what is left of the state, to rank what was asked for."""
    left = set(remainders_of(attribution))
    return (
        _chosen(attribution, [i for i in range(len(attribution)) if i not in left]) if left else attribution
    )


def strongest_of(
    attribution: Attribution, most: int = LISTED, among: Sequence[Attribution] = ()
) -> Attribution:
    """Return a long list's strongest components in their order, the rest summed where they are one split.

    Args:
        attribution: any; what stands in the text or in a grid is returned whole.
        most: how many are kept one by one, beside what is left of the state.
        among: all targets' attributions, where the same components are wanted of each.
    """
    if len(attribution) <= 2 * most or placed(attribution) or grid_of(attribution) is not None:
        return attribution
    left = set(remainders_of(attribution))
    ranked = _ranked(among or [attribution], left)
    shortened = _chosen(attribution, sorted([*left, *ranked[:most]]))
    if attribution.groups > 1:
        return shortened
    rest = attribution.scores[ranked[most:]].sum()
    return replace(
        shortened,
        scores=torch.cat([shortened.scores, rest[None]]),
        components=[*shortened.components, Component("others", f"the other {len(ranked) - most:,}")],
    )


def asked_for_together(attributions: Sequence[Attribution], most: int = LISTED) -> list[int]:
    """Return which components a matrix of several targets shows, in their order.

    Args:
        attributions: one a target, over the same components.
        most: how many at most where they stand for no text; then the strongest of any target.
    """
    first = attributions[0]
    if placed(first):
        return [i for i, span in enumerate(first.positions) if span is not None]
    return sorted(_ranked(attributions, set(remainders_of(first)))[:most])


def _ranked(attributions: Sequence[Attribution], left: set[int]) -> list[int]:
    """Return the components but for some, those first that have most of any target's strongest score."""
    kept = [i for i in range(len(attributions[0])) if i not in left]
    sizes = torch.stack([each.scores[kept].abs() for each in attributions])
    parts = (sizes / sizes.amax(1, keepdim=True).clamp_min(1e-30)).amax(0)
    return [kept[i] for i in torch.sort(parts, descending=True, stable=True).indices.tolist()]


def mean_of(attributions: Iterable[Attribution]) -> Attribution | None:
    """Return the mean of attributions over the same components, or None where these differ with the text."""
    rest = iter(attributions)
    first = next(rest, None)
    if first is None or placed(first):
        return None
    count, value, scores = 1, first.value, first.scores.double()
    for other in rest:
        if other.components != first.components:
            return None
        count, value, scores = count + 1, value + other.value, scores + other.scores
    return replace(first, scores=scores / count, value=value / count, metadata={})


def made(attribution: Attribution) -> str:
    """Write what the state was split into, and where: "tokens at layer 0", "heads of every layer"."""
    where = "of every layer" if attribution.groups > 1 else f"at layer {attribution.layer}"
    return f"{attribution.source} {where}"


def _chosen(attribution: Attribution, kept: Sequence[int]) -> Attribution:
    """Return some components as a list, no longer in groups."""
    return replace(
        attribution,
        scores=attribution.scores[list(kept)],
        components=[attribution.components[i] for i in kept],
        groups=1,
    )
