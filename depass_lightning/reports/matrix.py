"""What each generated token rests on, as a matrix in a terminal."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from depass_lightning.generation import Generation
from depass_lightning.reports.numbers import visible
from depass_lightning.reports.terminal import score_style

LABEL_WIDTH = 16
CELL_WIDTH = 4


def generation_matrix(generation: Generation, width: int) -> RenderableType:
    """Return the scores with a row a token and a column a generated one, in parts of the column's strongest.

    Args:
        generation: what to show.
        width: the terminal's, in letters; further columns stand in further matrices below.
    """
    fit = max((width - LABEL_WIDTH - 8) // CELL_WIDTH, 1)
    count = len(generation)
    parts = [_matrix(generation, range(first, min(first + fit, count))) for first in range(0, count, fit)]
    title = Text("what each generated token rests on, in tenths of the strongest of its column", "dim")
    return Group(title, *parts)


def _matrix(generation: Generation, columns: range) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", justify="right", style="bold", no_wrap=True)
    table.add_column("", max_width=LABEL_WIDTH, no_wrap=True)
    for column in columns:
        table.add_column(str(column + 1), justify="right", no_wrap=True, min_width=CELL_WIDTH - 1)
    scores = generation.scores
    strongest = scores.abs().amax(1, keepdim=True)
    strengths = (scores / strongest.where(strongest > 0, 1.0)).tolist()
    before = len(generation.tokens) - len(generation)
    for row, token in enumerate(generation.tokens[: before + columns[-1] + 1]):
        number = str(row - before + 1) if row >= before else ""
        cells = [_cell(strengths[column][row], known=row < before + column) for column in columns]
        name = Text(visible(token.strip(" ") or token), overflow="ellipsis", no_wrap=True)
        table.add_row(number, name, *cells)
    return table


def _cell(strength: float, *, known: bool) -> Text:
    """Return a score in tenths, on the ground that its size has; nothing where there is none."""
    tenths = round(abs(strength) * 10)
    if not known:
        return Text()
    written = f"{'−' if strength < 0 else '+'}{tenths}" if tenths else "·"
    return Text(written, score_style(strength) if tenths else "dim")
