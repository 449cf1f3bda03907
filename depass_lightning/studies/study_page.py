"""The page of an experiment: its figures, its table, and everything that the numbers depend on."""

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from depass_lightning.reports.numbers import measure_name, model_name, plain, visible
from depass_lightning.reports.page import asset, rendered
from depass_lightning.studies.study_figures import curves_figure, points_figure
from depass_lightning.studies.study_result import StudyResult, written

# The theme's name is kept under the key of the other pages.
SCRIPT = """"use strict";
(() => {
  const root = document.documentElement, key = "depass-theme";
  try { const kept = localStorage.getItem(key); if (kept) root.dataset.theme = kept; } catch {}
  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    try { localStorage.setItem(key, root.dataset.theme); } catch {}
  });
})();
"""


def experiment_html(experiment: StudyResult) -> str:
    """Return the page of an experiment; it needs no other file and no network."""
    facts = {
        "model": model_name(experiment.model),
        "data": experiment.data,
        "prompts": f"{experiment.prompts:,}",
        "time": f"{plain(experiment.seconds)} s",
    }
    figures = []
    if experiment.panels:
        figures.append(_figure("Curves", curves_figure, experiment.panels))
    if experiment.clouds:
        figures.append(_figure("Points", points_figure, experiment.clouds))
    columns = experiment.columns()
    return rendered(
        "experiment",
        SCRIPT,
        {},
        title=visible(experiment.title),
        facts={name: visible(value) for name, value in facts.items()},
        settings={
            name.replace("_", " "): visible(_setting(value))
            for name, value in experiment.settings.items()
            if value not in (None, [], (), {})  # what is not set
        },
        columns=[
            (
                visible(measure_name(name)),
                all(not isinstance(row.get(name), str) for row in experiment.table),
            )
            for name in columns
        ],
        rows=[[written(row.get(name)) for name in columns] for row in experiment.table],
        figures=figures,
        notes=[visible(note) for note in experiment.notes],
        intervals=any(
            curve.low is not None for panel in experiment.panels for curve in panel.curves.values()
        ),
        command=experiment.command,
        style=Markup(asset("page.css")),
    )


def _figure(name: str, draw: Any, drawn: Any) -> dict[str, str]:
    """Return a picture for each ground, as addresses that hold them."""
    return {
        "name": name,
        "light": _address(draw(drawn)),
        "dark": _address(draw(drawn, dark=True)),
        "alternative": "; ".join(panel.name for panel in drawn),
    }


def _address(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _setting(value: Any) -> str:
    """Write a setting's value for a reader."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value):
        return ", ".join(value)
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return plain(value) if isinstance(value, float) else str(value)
