"""One way to write down what an experiment found.

An experiment ends in an `StudyResult`: what was asked of which model with which data, how, and what came out
as curves, as clouds of points and as a table. `write_experiment` makes of it, in one folder,

- `results.json`: all of it, which `read_experiment` reads back;
- `curves.parquet` (`panel, method, x, y, low, high`) and `curves.svg`;
- `points.parquet` (`cloud, group, x, y`) and `points.svg`, where there are clouds;
- `table.parquet`: the rows of the table; a cell that is an `Interval` takes three columns, `accuracy`,
  `accuracy_low` and `accuracy_high`;
- `report.html`: one page with everything on it, which needs no other file.

`terminal_table` shows the rows in a terminal.

Example:
    >>> found = {"depass": [0.9, 0.4], "random": [0.9, 0.7]}
    >>> Experiment(
    ...     name="paper_tokens",
    ...     title="Which tokens does the answer rely on?",
    ...     model="tiny",
    ...     data="ioi",
    ...     prompts=100,
    ...     seconds=12.5,
    ...     panels=[Panel("patch top", "tokens removed (%)", "probability of the answer",
    ...                   {name: Curve([0, 50], y) for name, y in found.items()})],
    ...     table=[{"method": name, "area": sum(y) / 2} for name, y in found.items()],
    ... ).panels[0].name
    'patch top'
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.table import Table
from rich.text import Text

from depass_lightning.errors import DePassError
from depass_lightning.reports.figures import save_figure
from depass_lightning.reports.numbers import measure_name, model_name, plain, visible
from depass_lightning.studies.study_figures import curves_figure, points_figure
from depass_lightning.studies.study_page import experiment_html
from depass_lightning.studies.study_result import Cell, Cloud, Curve, Panel, StudyResult, check, written
from depass_lightning.utils.atomic_files import write_whole
from depass_lightning.utils.bootstrap import Interval

CURVES = pa.schema(
    [(name, pa.string()) for name in ("panel", "method")]
    + [(name, pa.float64()) for name in ("x", "y", "low", "high")]
)
POINTS = pa.schema(
    [(name, pa.string()) for name in ("cloud", "group")] + [(name, pa.float64()) for name in ("x", "y")]
)

WIDE = 6  # columns: more of them, with intervals, are wider than a terminal


def write_experiment(experiment: StudyResult, folder: str | os.PathLike[str]) -> Path:
    """Write an experiment's figures, files and page, each whole or not at all, and return the page's path.

    Args:
        experiment: what was found.
        folder: where to write; it is made where it is missing.

    Raises:
        DePassError: a curve or a cloud has not one value for each place, or a number is missing in it.
    """
    check(experiment)
    folder = Path(folder)
    content = json.dumps(_plain(asdict(experiment)), indent=2, ensure_ascii=False, allow_nan=False)
    _parquet(folder / "curves.parquet", _curve_rows(experiment), CURVES)
    if experiment.table:
        _parquet(folder / "table.parquet", [_flat(row, experiment.columns()) for row in experiment.table])
    if experiment.panels:
        save_figure(curves_figure(experiment.panels), folder / "curves.svg")
    if experiment.clouds:
        _parquet(folder / "points.parquet", _point_rows(experiment), POINTS)
        save_figure(points_figure(experiment.clouds), folder / "points.svg")
    write_whole(folder / "results.json", (content + "\n").encode())
    return write_whole(folder / "report.html", experiment_html(experiment).encode("utf-8", errors="replace"))


def read_experiment(folder: str | os.PathLike[str]) -> StudyResult:
    """Read what `write_experiment` wrote.

    Args:
        folder: the folder, or `results.json` in it.

    Raises:
        DePassError: there is no such file, or it holds no experiment.
    """
    path = Path(folder) / "results.json" if Path(folder).is_dir() else Path(folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        panels = [
            Panel(**{**panel, "curves": {name: Curve(**curve) for name, curve in panel["curves"].items()}})
            for panel in content.pop("panels")
        ]
        table = [{name: _cell(value) for name, value in row.items()} for row in content.pop("table")]
        clouds = [Cloud(**cloud) for cloud in content.pop("clouds")]
        return StudyResult(**content, panels=panels, table=table, clouds=clouds)
    except FileNotFoundError:
        raise DePassError(f"there is no {path}; give the folder of an experiment's results") from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise DePassError(f"{path} holds no experiment ({error})") from error


def terminal_table(experiment: StudyResult, width: int | None = None) -> Table:
    """Return the experiment's rows for a terminal, under its title; many columns without their intervals.

    Args:
        experiment: what was found.
        width: how many characters a line has; the columns that do not fit are left to the page. All are
            shown where None.
    """
    size = f"{experiment.prompts:,} prompts · {plain(experiment.seconds)} s"
    told = f"{model_name(experiment.model)} · {experiment.data} · {size}"
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", title=Text(experiment.title, "bold")
    )
    table.title_justify = table.caption_justify = "left"
    columns = experiment.columns()
    wide = len(columns) > WIDE
    cells = {
        column: [_short(row.get(column)) if wide else written(row.get(column)) for row in experiment.table]
        for column in columns
    }
    shown = columns if width is None else _fitting(cells, width)
    more, left = len(columns) - len(shown), []
    if more:
        left.append(f"{more} more column{'s' if more > 1 else ''}")
    if wide and any(isinstance(cell, Interval) for row in experiment.table for cell in row.values()):
        left.append("intervals")
    table.caption = Text(visible(told) + (f" · {' and '.join(left)} on the page" if left else ""), "dim")
    for column in shown:
        numbers = all(not isinstance(row.get(column), str) for row in experiment.table)
        table.add_column(
            measure_name(column), justify="right" if numbers else "left", no_wrap=not numbers
        )  # names are never cut
    for row in zip(*(cells[column] for column in shown), strict=True):
        table.add_row(*map(Text, row))
    return table


def _short(cell: Cell) -> str:
    """Write a cell without its interval."""
    return written(cell.value if isinstance(cell, Interval) else cell)


def _fitting(cells: Mapping[str, Sequence[str]], width: int) -> list[str]:
    """Return the first columns that a line has room for; differences, which repeat others, come last."""
    shown: list[str] = []
    for column in sorted(cells, key=lambda name: name.endswith("_difference")):
        words = [*column.split("_"), *cells[column]]
        width -= 3 + max(map(len, words))
        if width < 0:
            break
        shown.append(column)
    return [column for column in cells if column in shown]


def _curve_rows(experiment: StudyResult) -> list[dict[str, Any]]:
    return [
        {"panel": panel.name, "method": method, "x": x, "y": curve.y[i]}
        | {name: ends[i] for name, ends in (("low", curve.low), ("high", curve.high)) if ends is not None}
        for panel in experiment.panels
        for method, curve in panel.curves.items()
        for i, x in enumerate(curve.x)
    ]


def _point_rows(experiment: StudyResult) -> list[dict[str, Any]]:
    return [
        {"cloud": cloud.name, "group": group, "x": x, "y": y}
        for cloud in experiment.clouds
        for x, y, group in zip(cloud.x, cloud.y, cloud.groups, strict=True)
    ]


def _flat(row: Mapping[str, Cell], columns: Sequence[str]) -> dict[str, Any]:
    """Return a row of the table with an interval's ends in columns of their own."""
    flat: dict[str, Any] = {}
    for name in columns:
        cell = row.get(name)
        if isinstance(cell, Interval):
            flat |= {name: cell.value, f"{name}_low": cell.low, f"{name}_high": cell.high}
        else:
            flat[name] = cell
    return flat


def _parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> None:
    """Write rows, of which some may lack a column."""
    if schema is None:
        names = dict.fromkeys(name for row in rows for name in row)
        rows = [{name: row.get(name) for name in names} for row in rows]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    write_whole(path, buffer.getvalue().to_pybytes())


def _cell(value: Any) -> Any:
    return Interval(**value) if isinstance(value, dict) else value


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
