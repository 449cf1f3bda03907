"""The page of a sweep: models against tasks, what each run came to, and one prompt's maps side by side.

It is drawn with the report's own pieces (`page.py` and the scripts beside it): a map is a prompt of the
report, once for each run that has it.
"""

import base64
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from depass_lightning.errors import DePassError
from depass_lightning.reports.components import Grid
from depass_lightning.reports.numbers import visible
from depass_lightning.reports.page import asset, embedded, grid_data, joined, prompt_data
from depass_lightning.reports.palette import DARK, LIGHT, css_variables
from depass_lightning.results.attribution import Attribution
from depass_lightning.utils.atomic_files import write_whole

SCRIPTS = (
    "page_base.js",
    "page_panels.js",
    "page_prompt.js",
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
"""What a run is asked, by the names of the columns of a sweep's table."""

# What the matrix may show: the column, its name, how a number is written, and whether a small one is good.
NUMBERS = (
    ("evidence_first", "right token first", "percent", False),
    ("correct", "model is right", "percent", False),
    ("patch_top_area", "patch top area", "plain", True),
    ("recover_top_area", "recover top area", "plain", False),
    ("completeness_max", "completeness, worst", "plain", True),
    ("seconds_per_prompt", "seconds a prompt", "plain", True),
    ("seconds", "seconds", "plain", True),
    ("prompts", "prompts", "plain", False),
)


@dataclass(frozen=True)
class Map:
    """What one run says of one prompt.

    Attributes:
        run: the run, as its row calls it.
        prompt: the prompt's name, the same for all runs that have it and another's for no other.
        attribution: of the prompt.
        example: what is known of it, as for `write_page`.
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
        path: where to write it, in the sweep's folder; the file is written whole or not at all.
        rows: one a run: `run`, its folder below the sweep's; `status` and `reason`; what it was asked, by the
            names in `AXES`; and its numbers, by those in `NUMBERS`, beside the same at random (`_chance`).
        maps: of some prompts, those of one prompt together.
        title: what the page is about.

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
    script = joined(SCRIPTS)
    environment = Environment(
        loader=PackageLoader("depass_lightning", "reports/assets"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("sweep.html.j2").render(
        title=visible(title),
        subtitle=f"{done:,} runs are done" + (f", {len(rows) - done:,} are not" if done < len(rows) else ""),
        settings=shared,
        left=[
            {name: visible(str(row[name])) for name in ("run", "status", "reason")}
            for row in rows
            if row["status"] != "done"
        ],
        data=embedded(_data(rows, maps, axes)),
        style=Markup(asset("page.css") + asset("sweep.css")),
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_whole(path, page.encode("utf-8", errors="replace"))


def varying(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what runs were asked differently, by the names in `AXES`."""
    return [name for name in AXES if len({row.get(name) for row in rows}) > 1]


def _data(rows: Sequence[Mapping[str, Any]], maps: Sequence[Map], axes: Sequence[str]) -> dict[str, Any]:
    """Collect what the page's scripts read."""
    places = {row["run"]: place for place, row in enumerate(rows)}
    grids: list[Grid] = []
    prompts = [prompt_data(own.prompt, own.attribution, own.example, grids, ()) for own in maps]
    chosen: dict[str, list[tuple[int, int]]] = {}
    for place, own in enumerate(maps):
        chosen.setdefault(visible(own.prompt), []).append((places[own.run], place))
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
            {"key": key, "name": name, "write": write, "small": small}
            for key, name, write, small in NUMBERS
            if any(row.get(key) is not None for row in rows)
        ],
        # Those of one setting stand together: the models one under the other.
        "maps": [
            {
                "prompt": name,
                "of": sorted(own, key=lambda each: (settings.index(runs[each[0]]["setting"]), each)),
            }
            for name, own in chosen.items()
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
