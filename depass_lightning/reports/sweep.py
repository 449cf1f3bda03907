"""The page of a sweep: models by tasks, the results of each run, and one prompt's maps for comparison.

It uses the report's data and scripts (`page_data.py`, `page.py`): a map is a prompt of the report, once for
each run that has it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from depass_lightning.errors import DePassError
from depass_lightning.reports.components import Grid
from depass_lightning.reports.numbers import measure_name, visible
from depass_lightning.reports.page import asset, joined, rendered
from depass_lightning.reports.page_data import grid_data, prompt_data
from depass_lightning.results.attribution import Attribution
from depass_lightning.utils.atomic_files import write_whole

SCRIPTS = (
    "page_base.js",
    "page_panels.js",
    "page_prompt.js",
    "page_sections.js",
    "page_heat.js",
    "page_components.js",
    "sweep_numbers.js",
    "sweep_maps.js",
)
AXES = {
    "model": "model",
    "checkpoint": "checkpoint",
    "dtype": "dtype",
    "task": "task",
    "source": "source",
    "rule": "rule",
    "target": "target",
    "method": "method",
    "seed": "seed",
}
"""The settings of a run by column of a sweep's table."""

# The measures of the matrix: the column, the number format, and whether lower is better.
NUMBERS = (
    ("evidence_first", "percent", False),
    ("correct", "percent", False),
    ("patch_top_area", "plain", True),
    ("recover_top_area", "plain", False),
    ("completeness_max", "plain", True),
    ("seconds_per_prompt", "plain", True),
    ("seconds", "plain", True),
    ("prompts", "plain", False),
)


@dataclass(frozen=True)
class Map:
    """One run's attribution of one prompt.

    Attributes:
        run: the run's name in its row.
        prompt: the prompt's name, unique and the same for all runs that have it.
        attribution: the prompt's attribution.
        example: what is known of the prompt, see `write_page`.
    """

    run: str
    prompt: str
    attribution: Attribution
    example: Mapping[str, Any]


def write_sweep_page(
    path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], maps: Sequence[Map], *, title: str
) -> None:
    """Write the page.

    Args:
        path: the page's file in the sweep's folder, written whole or not at all.
        rows: one per run: `run`, its folder relative to the sweep's; `status` and `reason`; its settings, by
            the names in `AXES`; and its numbers, by those in `NUMBERS`, with their chance level (`_chance`).
        maps: the attributions of some prompts, those of one prompt consecutive.
        title: the page's title.

    Raises:
        DePassError: there are no rows.
    """
    if not rows:
        raise DePassError("the page of a sweep needs at least one run")
    done = sum(row["status"] == "done" for row in rows)
    axes = varying(rows)
    shared = {
        AXES[name]: visible(str(rows[0][name]))
        for name in AXES
        if name not in axes and rows[0].get(name) is not None
    }
    page = rendered(
        "sweep",
        joined(SCRIPTS),
        _data(rows, maps, axes),
        title=visible(title),
        subtitle=f"{done:,} runs are done" + (f", {len(rows) - done:,} are not" if done < len(rows) else ""),
        settings=shared,
        left=[
            {name: visible(str(row[name])) for name in ("run", "status", "reason")}
            for row in rows
            if row["status"] != "done"
        ],
        style=Markup(asset("page.css") + asset("sweep.css")),
    )
    write_whole(path, page.encode("utf-8", errors="replace"))


def varying(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the settings in `AXES` that differ between runs.

    Args:
        rows: one per run.
    """
    return [name for name in AXES if len({row.get(name) for row in rows}) > 1]


def _data(rows: Sequence[Mapping[str, Any]], maps: Sequence[Map], axes: Sequence[str]) -> dict[str, Any]:
    """Return the data of the page's scripts."""
    places = {row["run"]: place for place, row in enumerate(rows)}
    grids: list[Grid] = []
    prompts = [prompt_data(m.prompt, m.attribution, m.example, grids, ()) for m in maps]
    chosen: dict[str, list[tuple[int, int]]] = {}
    for place, shown in enumerate(maps):
        chosen.setdefault(visible(shown.prompt), []).append((places[shown.run], place))
    runs = [_run(row, axes) for row in rows]
    settings = list(dict.fromkeys(run["setting"] for run in runs))
    return {
        "prompts": prompts,
        "matrices": [],
        "mean": None,
        "grids": [grid_data(grid) for grid in grids],
        "notes": {},
        "timeline": None,
        "runs": runs,
        "axes": [{"key": name, "name": AXES[name]} for name in axes],
        "numbers": [
            {"key": key, "name": measure_name(key), "write": write, "small": small}
            for key, write, small in NUMBERS
            if any(row.get(key) is not None for row in rows)
        ],
        # Runs with the same setting are consecutive: the models one below the other.
        "maps": [
            {
                "prompt": name,
                "of": sorted(pairs, key=lambda pair: (settings.index(runs[pair[0]]["setting"]), pair)),
            }
            for name, pairs in chosen.items()
        ],
    }


def _run(row: Mapping[str, Any], axes: Sequence[str]) -> dict[str, Any]:
    settings = [name for name in axes if name not in ("model", "checkpoint", "task")]
    model = str(row["model"])
    if row.get("checkpoint"):
        model += f" + {row['checkpoint']}"
    return {
        "run": visible(row["run"]),
        "page": f"{quote(row['run'])}/report.html" if row["status"] == "done" else None,
        "model": visible(model),
        "task": visible(str(row["task"])),
        "setting": " · ".join(visible(str(row[name])) for name in settings if row.get(name) is not None),
        "asked": {name: visible(str(row[name])) for name in axes if row.get(name) is not None},
        "numbers": {
            key: {"value": row[key], "chance": row.get(f"{key}_chance")}
            for key, *_ in NUMBERS
            if row.get(key) is not None and math.isfinite(row[key])
        },
    }
