"""Training timeline: the attributions that the callback wrote at each step, with the loss."""

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depass_lightning.commands.console import existing_folder, skip_unreadable
from depass_lightning.errors import DePassError
from depass_lightning.monitoring.history import STABLE
from depass_lightning.reports.numbers import measure_name
from depass_lightning.reports.timeline_page import Frame, write_timeline
from depass_lightning.storage import attribution_from_row, read_rows

MAPS = re.compile(r"step-(\d+)\.parquet")
LINES = ("probability", "on_target", "value")  # curves of a probe set, drawn with the loss


def write_timelines(folder: str | Path) -> list[Path]:
    """Write a `timeline.html` for every probe set and source with two or more steps, and return the paths.

    Raises:
        DePassError: the folder has no attributions of `DePassCallback`.
    """
    folder = existing_folder(folder, "timeline")
    maps = folder / "depass"
    # With several sources, the set's folder has one subfolder per source.
    sets = sorted({path.parent for path in maps.rglob("step-*.parquet")})
    losses = read_losses(folder)
    pages, steps = [], 0
    for probe_set in sets:
        frames, examples = read_frames(probe_set)
        steps += len(frames)
        if len(frames) > 1:
            page, name = probe_set / "timeline.html", probe_set.relative_to(maps).as_posix()
            curves, stable = _curves(probe_set)
            steps_shown = f"{len(frames)} steps; choose one with the slider or by clicking a curve"
            with skip_unreadable(page):
                write_timeline(
                    page,
                    frames,
                    title=f"{name}: what the answers relied on during training",
                    subtitle="; ".join((steps_shown, *stable)),
                    examples=examples,
                    lines=losses | curves,
                )
                pages.append(page)
    if not steps:
        raise DePassError(
            f"{folder} holds no maps of DePassCallback (depass/<probes>/step-*.parquet); give a run's folder"
        )
    return pages


def read_frames(folder: Path) -> tuple[list[Frame], dict[str, Mapping[str, Any]]]:
    """Read the attributions of one probe set.

    Returns:
        One frame per step, in order, and each prompt's evidence by its id. A step whose file cannot be read
        is skipped with a message.
    """
    frames, examples = [], {}
    for path in sorted(folder.iterdir()):
        match = MAPS.fullmatch(path.name)
        if match:
            with skip_unreadable(path):
                rows = read_rows(path)
                attributions = {row["id"]: attribution_from_row(row) for row in rows}
                evidence = {row["id"]: {"evidence": row["evidence"] or ()} for row in rows}
                frames.append(Frame(f"step {int(match[1])}", int(match[1]), attributions))
                examples |= evidence
    return sorted(frames, key=lambda frame: frame.step), examples


def read_losses(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Read the losses that Lightning's CSV logger has written into a run's folder, by name."""
    losses: dict[str, list[tuple[float, float]]] = {}
    for path in sorted(folder.rglob("metrics.csv")):
        with skip_unreadable(path), path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name and "loss" in name and value and row.get("step"):
                        losses.setdefault(name, []).append((float(row["step"]), float(value)))
    return {name: _finite(points) for name, points in losses.items()}


def _curves(folder: Path) -> tuple[dict[str, list[tuple[float, ...]]], list[str]]:
    """Return a probe set's curves, with null bands or else intervals, and the step of stable ranks."""
    path = folder / "history.json"
    if not path.is_file():
        return {}, []
    with skip_unreadable(path):
        history, curves = json.loads(path.read_text(encoding="utf-8")), {}
        for name, curve in history["curves"].items():
            if name in LINES:
                label = f"all probes: {measure_name(name)}"
                points = list(zip(history["steps"], curve, strict=True))
                for key, kind in (("null_bands", "null band"), ("intervals", "95% CI")):
                    bands = history.get(key, {}).get(name, [None])
                    if None not in bands:
                        curves[f"{label}, {kind}"] = [
                            (x, y, *band) for (x, y), band in zip(points, bands, strict=True) if y is not None
                        ]
                        break
                else:
                    curves[label] = _finite(points)
        step = history.get("stable_from")
        stable = [] if step is None else [f"ranks are stable from step {step}, 1 − Spearman below {STABLE}"]
        return curves, stable
    return {}, []


def _finite(points: Any) -> list[tuple[float, float]]:
    return sorted((float(x), float(y)) for x, y in points if y is not None and math.isfinite(y))
