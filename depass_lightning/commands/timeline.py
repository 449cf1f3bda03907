"""A training timeline: what the callback wrote at each step, and the loss, one page per probe set."""

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depass_lightning.commands.console import folder_of, left_out
from depass_lightning.errors import DePassError
from depass_lightning.reports.timeline_page import Frame, write_timeline
from depass_lightning.storage import attribution_from_row, read_rows

MAPS = re.compile(r"step-(\d+)\.parquet")
LINES = ("probability", "on_target", "value")  # of a probe set, beside the loss


def write_timelines(folder: str | Path) -> list[Path]:
    """Write `timeline.html` next to the maps of every probe set and source with two or more steps.

    Args:
        folder: the run's folder, in which the callback made a folder `depass`.

    Returns:
        The pages.

    Raises:
        DePassError: there are no maps in the folder.
    """
    folder = folder_of(folder, "timeline")
    maps = folder / "depass"
    # with several sources each has a folder of its own, within its set's
    sets = sorted({path.parent for path in maps.rglob("step-*.parquet")})
    losses = read_losses(folder)
    pages, steps = [], 0
    for own in sets:
        frames, examples = read_frames(own)
        steps += len(frames)
        if len(frames) > 1:
            page, name = own / "timeline.html", own.relative_to(maps).as_posix()
            with left_out(page):
                write_timeline(
                    page,
                    frames,
                    title=f"{name}: what the answers were based on while the model trained",
                    subtitle=f"{len(frames)} steps; the slider walks over them, the curves can be clicked",
                    examples=examples,
                    lines=losses | _curves(own),
                )
                pages.append(page)
    if not steps:
        raise DePassError(
            f"{folder} holds no maps of DePassCallback (depass/<probes>/step-*.parquet); give a run's folder"
        )
    return pages


def read_frames(folder: Path) -> tuple[list[Frame], dict[str, Mapping[str, Any]]]:
    """Read the maps of one probe set.

    Args:
        folder: where `step-000120.parquet` and the like are.

    Returns:
        A frame a step, in order, and what is known of each prompt by its id. A step whose file cannot be read
        is left out.
    """
    frames, examples = [], {}
    for path in sorted(folder.iterdir()):
        match = MAPS.fullmatch(path.name)
        if match:
            with left_out(path):
                rows = read_rows(path)
                own = {row["id"]: attribution_from_row(row) for row in rows}
                known = {row["id"]: {"evidence": row["evidence"] or ()} for row in rows}
                frames.append(Frame(f"step {int(match[1])}", int(match[1]), own))
                examples |= known
    return sorted(frames, key=lambda frame: frame.at), examples


def read_losses(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Read the losses that Lightning's CSV logger has written below a run's folder, by their names."""
    losses: dict[str, list[tuple[float, float]]] = {}
    for path in sorted(folder.rglob("metrics.csv")):
        with left_out(path), path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name and "loss" in name and value and row.get("step"):
                        losses.setdefault(name, []).append((float(row["step"]), float(value)))
    return {name: _finite(points) for name, points in losses.items()}


def _curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """The set's own curves."""
    path = folder / "history.json"
    if not path.is_file():
        return {}
    with left_out(path):
        history = json.loads(path.read_text(encoding="utf-8"))
        return {
            f"all probes: {name.replace('_', ' ')}": _finite(zip(history["steps"], curve, strict=True))
            for name, curve in history["curves"].items()
            if name in LINES
        }
    return {}


def _finite(points: Any) -> list[tuple[float, float]]:
    return sorted((float(x), float(y)) for x, y in points if y is not None and math.isfinite(y))
