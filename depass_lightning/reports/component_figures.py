"""Figures of components that are not positions of the text: a heat map of all layers' heads, or bars."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from depass_lightning.reports.components import asked_for, grid_of, made, placed, remainders_of
from depass_lightning.reports.figures import (
    MARGIN,
    WIDTH,
    canvas,
    draw_scale,
    font_width,
    tokens_figure,
    write,
)
from depass_lightning.reports.numbers import model_name, signed, visible
from depass_lightning.reports.palette import DARK, LIGHT, Theme, hexadecimal, ink, shade
from depass_lightning.results.attribution import Attribution

LISTED = 16  # bars
NUMBERED = 36  # points; cells of at least this width show their scores
TOP = 64  # points, above the first row


def attribution_figure(attribution: Attribution, dark: bool = False, title: str | None = None) -> Figure:
    """Draw an attribution as coloured text, as a heat map of layers and heads, or as bars.

    Args:
        attribution: the attribution.
        dark: use the dark theme.
        title: the title; by default the target and its value. Coloured text has none.
    """
    if placed(attribution):
        return tokens_figure(attribution, dark=dark)
    if grid_of(attribution) is not None:
        return heat_figure(attribution, dark=dark, title=title)
    return bars_figure(attribution, dark=dark, title=title)


def heat_figure(attribution: Attribution, dark: bool = False, title: str | None = None) -> Figure:
    """Draw the components of all layers as a heat map: one row per layer, one column per head.

    The last columns are numbers: what remains of each layer's state.

    Args:
        attribution: the attribution of heads or modules of every layer.
        dark: use the dark theme.
        title: the title; by default the target and its value.
    """
    theme, grid = DARK if dark else LIGHT, grid_of(attribution)
    assert grid is not None, "components that are not in a grid are drawn by bars_figure"
    rows = attribution.grid().tolist()
    full = max((abs(row[i]) for row in rows for i in grid.cells), default=0.0) or 1.0
    left, aside = MARGIN + 34, 58 * len(grid.remainders)
    across = min((WIDTH * 72 - left - MARGIN - aside) / len(grid.cells), 90 if len(grid.cells) > 1 else 180)
    down = min(max(across, 14), 26)
    height = TOP + 20 + down * len(rows) + 48
    figure, axes = canvas(WIDTH * 72, height, theme)
    _headline(axes, attribution, theme, height, title)
    muted = hexadecimal(theme.muted)
    word = grid.columns[grid.cells[0]].rpartition(" ")[0]
    write(axes, left - 8, height - TOP - 6, "layer", 9, color=muted, ha="right")
    stride = max(1, round(18 / across))
    for k, column in enumerate(grid.cells):
        name = grid.columns[column].removeprefix(word).strip() if k else grid.columns[column]
        wide = font_width(name, 9) <= across
        if k % stride == 0:
            text = name if wide or k else name.removeprefix(word).strip()
            write(axes, left + (k + 0.5) * across, height - TOP - 6, text, 9, color=muted, ha="center")
    right = left + across * len(grid.cells)
    for k, column in enumerate(grid.remainders):
        write(axes, right + 58 * (k + 1), height - TOP - 6, grid.columns[column], 9, color=muted, ha="right")
    for number, (layer, row) in enumerate(zip(grid.layers, rows, strict=True)):
        y = height - TOP - 20 - down * (number + 1)
        write(axes, left - 8, y + down / 2, str(layer), 9, color=muted, ha="right")
        for k, column in enumerate(grid.cells):
            _cell(axes, (left + k * across, y, across, down), row[column], full, theme)
        for k, column in enumerate(grid.remainders):
            text = signed(row[column])
            write(axes, right + 58 * (k + 1), y + down / 2, text, 9, color=muted, ha="right")
    draw_scale(axes, full, theme)
    return figure


def bars_figure(attribution: Attribution, dark: bool = False, title: str | None = None) -> Figure:
    """Draw the strongest components as bars.

    Args:
        attribution: the attribution of neurons, subspaces or one layer's heads.
        dark: use the dark theme.
        title: the title; by default the target and its value.
    """
    theme = DARK if dark else LIGHT
    shown = asked_for(attribution).top(LISTED, absolute=True)
    height = TOP + 22 * len(shown) + 20
    figure, axes = canvas(WIDTH * 72, height, theme)
    _headline(axes, attribution, theme, height, title)
    low = min([0.0, *(score for _, score in shown)])
    span = max([0.0, *(score for _, score in shown)]) - low or 1.0
    left, width = MARGIN + 130, WIDTH * 72 - 2 * MARGIN - 130 - 60
    for number, (name, score) in enumerate(shown):
        y = height - TOP - 22 * number
        write(axes, left - 10, y, visible(name), 10.5, color=hexadecimal(theme.ink), ha="right")
        start = left + width * (min(score, 0.0) - low) / span
        colour = hexadecimal(theme.positive if score > 0 else theme.negative)
        length = width * abs(score) / span
        axes.add_patch(Rectangle((start, y - 7), length, 14, facecolor=colour, linewidth=0))
        write(axes, WIDTH * 72 - MARGIN, y, signed(score), 10, color=hexadecimal(theme.ink), ha="right")
    return figure


def _cell(
    axes: Axes, box: tuple[float, float, float, float], score: float, full: float, theme: Theme
) -> None:
    x, y, width, height = box
    ground = shade(theme, score / full)
    line = {"edgecolor": hexadecimal(theme.line), "linewidth": 0.4}
    axes.add_patch(
        Rectangle((x + 0.5, y + 0.5), width - 1, height - 1, facecolor=hexadecimal(ground), **line)
    )
    if width >= NUMBERED:
        colour = hexadecimal(ink(ground))
        write(axes, x + width / 2, y + height / 2, signed(score), 8.5, color=colour, ha="center")


def _headline(axes: Axes, attribution: Attribution, theme: Theme, height: float, title: str | None) -> None:
    """Write the title, and the settings below it."""
    value = title or f"{visible(attribution.target)} = {signed(attribution.value)}"
    write(axes, MARGIN, height - 26, value, 13.5, color=hexadecimal(theme.ink), weight="bold")
    parts = [model_name(str(attribution.metadata.get("model", ""))), made(attribution), attribution.rule]
    if attribution.groups == 1:
        left = remainders_of(attribution)
        parts += [f"{attribution.components[i].label} {signed(attribution.scores[i].item())}" for i in left]
    how = "  ·  ".join(part for part in parts if part)
    write(axes, MARGIN, height - 44, how, 9.5, color=hexadecimal(theme.muted))
