"""The pictures of an experiment: curves with their intervals, and clouds of points."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.ticker import MaxNLocator

from depass_lightning.reports.figures import FAMILIES
from depass_lightning.reports.palette import DARK, LIGHT, Theme, hexadecimal
from depass_lightning.studies.study_result import Cloud, Panel

# After the first method, which has the palette's own blue, in an order in which neighbours can be told apart
# with every common kind of colour blindness (after Okabe and Ito).
OTHERS = ("#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a5195", "#8c564b", "#6b7280")
MARKERS = "osD^vPX*h"
RANDOM = (((4, 3), "x"), ((1, 2), "+"))
AGAIN = (0, (5, 1.2))  # where the colours begin again
WIDE = 200  # from the least place to the greatest: more than a linear axis can show
COLUMNS = 2
SIZE = 8.5


def curves_figure(panels: Sequence[Panel], dark: bool = False) -> Figure:
    """Draw each panel's lines, with their intervals as bands.

    Args:
        panels: what to draw; a method has one colour in all of them.
        dark: for a dark ground.
    """
    theme = DARK if dark else LIGHT
    methods = list(dict.fromkeys(method for panel in panels for method in panel.curves))
    looks = _looks(methods, theme)
    figure, grid = _grid(len(panels), theme)
    for panel, axes in zip(panels, grid, strict=True):
        for method, curve in panel.curves.items():
            look = looks[method]
            if curve.low is not None and curve.high is not None:
                axes.fill_between(
                    curve.x, curve.low, curve.high, color=look["color"], alpha=0.13, linewidth=0
                )
            axes.plot(curve.x, curve.y, label=method.replace("_", " "), markersize=4, **look)
        _finish(axes, panel.name, theme, panel.x_label, panel.y_label)
        _scale(axes, sorted({float(x) for curve in panel.curves.values() for x in curve.x}))
        axes.grid(axis="y", color=hexadecimal(theme.line), linewidth=0.8)
    _legend(figure, grid, theme)
    return figure


def points_figure(clouds: Sequence[Cloud], dark: bool = False) -> Figure:
    """Draw each cloud's points in the colours of their groups.

    Args:
        clouds: what to draw; a group has one colour in all of them.
        dark: for a dark ground.
    """
    theme = DARK if dark else LIGHT
    names = list(dict.fromkeys(group for cloud in clouds for group in cloud.groups))
    looks = _looks(names, theme)
    figure, grid = _grid(len(clouds), theme)
    for cloud, axes in zip(clouds, grid, strict=True):
        for name in names:
            rows = [i for i, group in enumerate(cloud.groups) if group == name]
            look = looks[name]
            axes.scatter(
                [cloud.x[i] for i in rows],
                [cloud.y[i] for i in rows],
                label=name,
                s=13,
                color=look["color"],
                marker=look["marker"],
                linewidths=0,
            )
        _finish(axes, cloud.name, theme)
        axes.set(xticks=[], yticks=[])
    if len(names) <= len(OTHERS) + 1:
        _legend(figure, grid, theme)
    return figure


def _looks(names: Sequence[str], theme: Theme) -> dict[str, dict[str, Any]]:
    """Return each method's or group's colour and marker; what is random is grey and dashed."""
    looks: dict[str, dict[str, Any]] = {}
    number = random = 0
    for name in names:
        if name.startswith("random"):
            dashes, marker = RANDOM[random % len(RANDOM)]
            grey = {"color": hexadecimal(theme.muted), "linewidth": 1.5, "linestyle": (0, dashes)}
            looks[name] = {**grey, "marker": marker}
            random += 1
            continue
        colour = hexadecimal(theme.positive) if number == 0 else OTHERS[(number - 1) % len(OTHERS)]
        dashes = AGAIN if number > len(OTHERS) else "-"
        look = {"color": colour, "linewidth": 2.0, "linestyle": dashes}
        looks[name] = look | {"marker": MARKERS[number % len(MARKERS)]}
        number += 1
    return looks


def _grid(count: int, theme: Theme) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels, two in a row."""
    columns = min(max(count, 1), COLUMNS)
    rows = math.ceil(max(count, 1) / columns)
    figure = Figure(
        figsize=(4.9 * columns, 3.5 * rows),
        facecolor=hexadecimal(theme.ground),
        dpi=100,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def _finish(axes: Axes, name: str, theme: Theme, x_label: str = "", y_label: str = "") -> None:
    muted = hexadecimal(theme.muted)
    font = {"fontsize": SIZE, "family": _families(), "parse_math": False}
    heading = {**font, "fontsize": 10.5, "weight": "bold", "color": hexadecimal(theme.ink)}
    axes.set_title(f"{name[:1].upper()}{name[1:]}", loc="left", **heading)
    axes.set_xlabel(x_label, color=muted, **font)
    axes.set_ylabel(y_label, color=muted, **font)
    axes.set_facecolor("none")
    axes.tick_params(colors=muted, labelsize=SIZE, labelfontfamily=_families(), length=0)
    axes.spines[:].set_visible(False)


def _scale(axes: Axes, places: Sequence[float]) -> None:
    """Mark whole places where all are whole; where they span too much for that, each by its logarithm."""
    positive = [place for place in places if place > 0]
    if positive and min(places) >= 0 and positive[-1] / positive[0] > WIDE:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.4)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    elif all(place.is_integer() for place in places):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _legend(figure: Figure, grid: Sequence[Axes], theme: Theme) -> None:
    """Name below all panels what each look stands for, once."""
    named = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(
        list(named.values()),
        list(named),
        loc="outside lower center",
        ncols=4 if len(grid) > 1 else 2,
        frameon=False,
        prop=FontProperties(family=_families(), size=SIZE + 0.5),
        labelcolor=hexadecimal(theme.ink),
    )


def _families() -> list[str]:
    installed = set(fontManager.get_font_names())
    return [family for family in FAMILIES if family in installed]
