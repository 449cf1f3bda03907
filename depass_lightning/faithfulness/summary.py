"""What a run found, in one object: means over its prompts."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from depass_lightning.faithfulness.removal import area

BETTER = {"patch_top": "lower is better", "recover_top": "higher is better"}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means over a run's rows, ready for JSON, for a page and for a terminal.

    Args:
        rows: rows of `depass_lightning.storage.ATTRIBUTION_SCHEMA`, as `read_rows` gives them.

    Returns:
        What the rows know of these: `prompts`; `correct`, the share of prompts that the model answers right;
        `completeness_max` and `completeness_mean`; `evidence_first`, how often the known evidence scores
        highest, beside chance; `patch_top_area` and `recover_top_area`, the mean height of the curves, beside
        that of random orders; and the mean `curves` themselves: the answer's probability at each fraction.
    """
    summary: dict[str, Any] = {"prompts": len(rows)}
    if known := [row["correct"] for row in rows if row["correct"] is not None]:
        summary["correct"] = fmean(known)
    if errors := [row["completeness"] for row in rows]:
        summary |= {"completeness_max": max(errors), "completeness_mean": fmean(errors)}
    if scored := [row for row in rows if row["evidence_first"] is not None]:
        found: dict[str, Any] = {
            "value": fmean(row["evidence_first"] for row in scored),
            "chance": fmean(row["evidence_chance"] for row in scored),
        }
        if len(scored) < len(rows):
            found["note"] = f"known for {len(scored)} of {len(rows)} prompts"
        summary["evidence_first"] = found
    if measured := [row for row in rows if row["patch_top"] is not None]:
        summary |= _removal(measured)
    return summary


def _removal(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the areas and the mean curves of patch top and recover top, beside random orders."""
    percents = rows[0]["percents"]
    areas, curves = {}, {}
    for name, better in BETTER.items():
        depass, random = _mean(rows, name), _mean(rows, name.replace("top", "random"))
        curves[name] = {"fraction": [p / 100 for p in percents], "depass": depass, "random": random}
        if len(percents) > 1:
            value, chance = area(percents, depass), area(percents, random)
            areas[f"{name}_area"] = {"value": value, "chance": chance, "note": better}
    return {**areas, "curves": curves}


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [fmean(at) for at in zip(*(row[name] for row in rows), strict=True)]
