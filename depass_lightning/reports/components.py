"""Grids, lists and means of components that are not positions of the text, such as heads and neurons."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from depass_lightning.results.attribution import Attribution
from depass_lightning.results.component import Component

WIDEST = 102  # columns of a heat map; components with more, such as neurons, are a list
LISTED = 60  # components of a long list that are shown


@dataclass(frozen=True)
class Grid:
    """The components of all layers in rows: component i is in row i // width and column i % width.

    Attributes:
        layers: the layer of each row.
        columns: the name of each column: "head 3", "state".
        cells: the columns of the source's components.
        remainders: the columns of the rest of the state.
    """

    layers: tuple[int, ...]
    columns: tuple[str, ...]
    cells: list[int]
    remainders: list[int]


def grid_of(attribution: Attribution) -> Grid | None:
    """Return the components' grid; None if they are not a grid of layers, or too many to draw."""
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
    """Return whether any component is a position or span of the text."""
    return any(span is not None for span in attribution.positions)


def complete(attribution: Attribution) -> bool:
    """Return whether the scores must sum to the value.

    Those of control paths, which are only a part of it, and of other methods need not.
    """
    return attribution.attention_path == "content" and attribution.method == "depass"


def repeats_of(attribution: Attribution) -> dict[int, int]:
    """Return the numbers of components whose word occurs several times, from 1 in the order of the text.

    Args:
        attribution: the attribution.
    """
    names = {
        i: component.label.strip()
        for i, component in enumerate(attribution.components)
        if component.span and any(map(str.isalnum, component.label))
    }
    counts, seen = Counter(names.values()), Counter[str]()
    numbers: dict[int, int] = {}
    for i, name in sorted(names.items(), key=lambda entry: attribution.positions[entry[0]] or (0, 0)):
        seen[name] += 1
        if counts[name] > 1:
            numbers[i] = seen[name]
    return numbers


def remainders_of(attribution: Attribution) -> list[int]:
    """Return the indices of the components that are the rest of a state: large, and not what was asked for.

    There are none if components are positions of the text: a bias is listed with them.
    """
    if placed(attribution):
        return []
    remainders = [i for i, component in enumerate(attribution.components) if component.remainder]
    return remainders if len(remainders) < len(attribution) else []


def asked_for(attribution: Attribution) -> Attribution:
    """Return the attribution without the rest of the state, to rank the components that were asked for."""
    left = set(remainders_of(attribution))
    return (
        _chosen(attribution, [i for i in range(len(attribution)) if i not in left]) if left else attribution
    )


def strongest_of(
    attribution: Attribution, most: int = LISTED, among: Sequence[Attribution] = ()
) -> Attribution:
    """Return a long list's strongest components in their order; the others are summed if there is one group.

    Args:
        attribution: the attribution; one of the text or in a grid is returned unchanged.
        most: the number of components to keep besides the rest of the state.
        among: the attributions of all targets, to keep the same components for all of them.
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
    """Return the indices of the components that a matrix of several targets shows, in their order.

    Args:
        attributions: one per target, over the same components.
        most: the maximum number if they are not positions of the text: the strongest of any target.
    """
    first = attributions[0]
    if placed(first):
        return [i for i, span in enumerate(first.positions) if span is not None]
    return sorted(_ranked(attributions, set(remainders_of(first)))[:most])


def _ranked(attributions: Sequence[Attribution], left: set[int]) -> list[int]:
    """Return all components but `left`, sorted by their largest score relative to a target's strongest."""
    kept = [i for i in range(len(attributions[0])) if i not in left]
    sizes = torch.stack([attribution.scores[kept].abs() for attribution in attributions])
    parts = (sizes / sizes.amax(1, keepdim=True).clamp_min(1e-30)).amax(0)
    return [kept[i] for i in torch.sort(parts, descending=True, stable=True).indices.tolist()]


def mean_of(attributions: Iterable[Attribution]) -> Attribution | None:
    """Return the mean of attributions over the same components; None if these depend on the text."""
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
    """Describe the source: "tokens at layer 0", "heads of every layer"."""
    where = "of every layer" if attribution.groups > 1 else f"at layer {attribution.layer}"
    return f"{attribution.source} {where}"


def _chosen(attribution: Attribution, kept: Sequence[int]) -> Attribution:
    """Return some of the components as one group."""
    return replace(
        attribution,
        scores=attribution.scores[list(kept)],
        components=[attribution.components[i] for i in kept],
        groups=1,
    )
