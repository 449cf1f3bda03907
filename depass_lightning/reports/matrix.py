"""Several targets of one prompt, or all tokens of a generation, as a matrix in a terminal."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from depass_lightning.reports.components import asked_for_together, complete
from depass_lightning.reports.numbers import plain, signed, visible
from depass_lightning.reports.terminal import score_style
from depass_lightning.results.attributions import Attributions

LABEL_WIDTH = 16
CELL_WIDTH = 4
ROWS = 24  # of components that are not positions of the text, the strongest


def score_matrix(attributions: Attributions, width: int) -> RenderableType:
    """Return one row of scores per component and one column per target, relative to the column's largest.

    Of components that are not positions of the text, such as heads, only the strongest have a row.

    Args:
        attributions: the scores.
        width: the terminal's width in characters; further columns follow in further matrices below.
    """
    fit = max((width - LABEL_WIDTH - 8) // CELL_WIDTH, 1)
    count = len(attributions)
    parts = [_matrix(attributions, range(first, min(first + fit, count))) for first in range(0, count, fit)]
    if attributions.first_generated is not None:
        title = "what each generated token relies on, in tenths of the column's largest score"
        return Group(Text(title, "dim"), *parts)
    title = "what each target relies on, in tenths of the column's largest score"
    if complete(attributions[0]):
        title += f"; completeness error {plain(attributions.completeness.max().item())}"
    return Group(_legend(attributions), Text(), Text(title, "dim"), *parts)


def _legend(attributions: Attributions) -> Table:
    """Return the targets by their numbers, with their values."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", style="bold")
    table.add_column()
    table.add_column(justify="right")
    for number, attribution in enumerate(attributions, start=1):
        table.add_row(str(number), Text(visible(attribution.target)), Text(signed(attribution.value)))
    return table


def _matrix(attributions: Attributions, columns: range) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", justify="right", style="bold", no_wrap=True)
    table.add_column("", max_width=LABEL_WIDTH, no_wrap=True)
    for column in columns:
        table.add_column(str(column + 1), justify="right", no_wrap=True, min_width=CELL_WIDTH - 1)
    components = attributions.components
    rows = asked_for_together(attributions, ROWS)
    scores = attributions.scores[:, rows]
    strongest = scores.abs().amax(1, keepdim=True)
    strengths = (scores / strongest.where(strongest > 0, 1.0)).tolist()
    last = max(attributions[column].last for column in columns)
    generated = attributions.first_generated
    for row, component in enumerate(rows):
        span, name = components[component].span, components[component].label
        if span is not None and span[0] > last + (generated is not None):
            continue
        number = ""
        if generated is not None and span is not None and span[0] >= generated:
            number = str(span[0] - generated + 1)
        cells = [
            _cell(strengths[column][row], known=span is None or span[0] <= attributions[column].last)
            for column in columns
        ]
        label = Text(visible(name.strip(" ") or name), overflow="ellipsis", no_wrap=True)
        table.add_row(number, label, *cells)
    return table


def _cell(strength: float, *, known: bool) -> Text:
    """Return a score in tenths, on a background coloured by its size; nothing where there is none."""
    tenths = round(abs(strength) * 10)
    if not known:
        return Text()
    written = f"{'−' if strength < 0 else '+'}{tenths}" if tenths else "·"
    return Text(written, score_style(strength) if tenths else "dim")
