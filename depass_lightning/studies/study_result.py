"""What an experiment found: curves, clouds of points and a table, with all that they depend on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.reports.numbers import plain, visible
from depass_lightning.utils.bootstrap import Interval

Cell = str | int | float | bool | Interval | None


@dataclass(frozen=True)
class Curve:
    """One method's line in a panel.

    Args:
        x: where it was measured, in the panel's unit.
        y: what was measured there.
        low: the lower end of each point's interval; None where there are no intervals.
        high: the upper end.
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    @classmethod
    def of(cls, x: Sequence[float], intervals: Sequence[Interval]) -> "Curve":
        """Return the line through intervals, one at each place."""
        ends = (
            [interval.value for interval in intervals],
            [interval.low for interval in intervals],
            [interval.high for interval in intervals],
        )
        return cls(list(x), *ends)


@dataclass(frozen=True)
class Panel:
    """Lines that are drawn together.

    Args:
        name: what the panel shows.
        x_label: what its x is, with the unit.
        y_label: what its y is.
        curves: the lines by method, in the order of the legend. "random" is drawn as what to beat, and so is
            every method whose name begins with it.
    """

    name: str
    x_label: str
    y_label: str
    curves: Mapping[str, Curve]


@dataclass(frozen=True)
class Cloud:
    """Points of several groups that are drawn together, such as a t-SNE picture.

    Args:
        name: what it shows.
        x: each point's place.
        y: each point's place.
        groups: each point's group, which has a colour.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    groups: Sequence[str]


@dataclass(frozen=True)
class StudyResult:
    """What an experiment found, with everything that the numbers depend on.

    Args:
        name: the experiment's name, as in `experiment=paper_truthful`.
        title: what it asks, in one line.
        model: the model's name.
        data: the data's names and sizes, in words.
        prompts: how many prompts the numbers are over.
        seconds: how long it took.
        settings: whatever else the numbers depend on: seeds, rules, layers; plain values.
        panels: the curves.
        table: the rows, each a mapping from column to cell. The columns are those of the first row that has
            them, in order.
        clouds: points.
        notes: sentences on how to read it, what was chosen and when, and what does not hold.
        command: what to type to do it again.
    """

    name: str
    title: str
    model: str
    data: str
    prompts: int
    seconds: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    panels: Sequence[Panel] = ()
    table: Sequence[Mapping[str, Cell]] = ()
    clouds: Sequence[Cloud] = ()
    notes: Sequence[str] = ()
    command: str = ""

    def columns(self) -> list[str]:
        """Return the table's columns."""
        return list(dict.fromkeys(name for row in self.table for name in row))


def data_name(path: str | None) -> str:
    """Return what a file or a data set is called: a file's name without its folders; nothing without one."""
    if path is None or path.startswith("hub:"):
        return (path or "").removeprefix("hub:")
    return PurePath(path).name


def written(cell: Cell) -> str:
    """Write a cell for a reader: an interval as its value and, in brackets, its ends."""
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, Interval):
        return f"{plain(cell.value)} ({plain(cell.low)} to {plain(cell.high)})"
    if isinstance(cell, int):
        return f"{cell:,}"
    return plain(cell) if isinstance(cell, float) else visible(cell)


def check(experiment: StudyResult) -> None:
    """Raise an error for values that cannot be drawn, with their place.

    Raises:
        DePassError: a curve or a cloud has not one value for each place, or a number that is not finite.
    """
    for panel in experiment.panels:
        for method, curve in panel.curves.items():
            name = f"the curve {method!r} of {panel.name!r}"
            _check_numbers(name, {key: ys for key, ys in asdict(curve).items() if ys is not None})
            if (curve.low is None) != (curve.high is None):
                raise DePassError(f"{name} has one end of its intervals; give both, low and high, or neither")
    for cloud in experiment.clouds:
        _check_numbers(f"the cloud {cloud.name!r}", {"x": cloud.x, "y": cloud.y})
        if len(cloud.groups) != len(cloud.x):
            raise DePassError(
                f"the cloud {cloud.name!r} has {len(cloud.groups)} groups for {len(cloud.x)} points"
            )


def _check_numbers(name: str, numbers: Mapping[str, Sequence[float]]) -> None:
    lengths = {key: len(values) for key, values in numbers.items()}
    if len(set(lengths.values())) != 1 or not lengths["x"]:
        told = ", ".join(f"{length} of {key}" for key, length in lengths.items())
        raise DePassError(f"{name} needs one value for each place, and one place at least; got {told}")
    for key, values in numbers.items():
        if not all(math.isfinite(value) for value in values):
            raise DePassError(f"{name} has a number in {key} that is not finite; leave that place out")
