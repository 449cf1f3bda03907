"""What a run found, in one object: means over its prompts."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from depass_lightning.faithfulness.removal import area

CURVES = ("patch_top", "patch_random", "recover_top", "recover_random")


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means over a run's rows, ready for JSON.

    Args:
        rows: rows of `depass_lightning.storage.ATTRIBUTION_SCHEMA`, as `read_rows` gives them.

    Returns:
        `prompts`; `correct`, the share of prompts that the model answers right; `completeness` (`max`,
        `mean`); `evidence` (`prompts` where it is known, `first`: the share where it scores highest,
        `chance`); `faithfulness` (`prompts`, `percents`, the four mean curves and their `area`). What no
        row knows is None.
    """
    known = [row["correct"] for row in rows if row["correct"] is not None]
    errors = [row["completeness"] for row in rows]
    return {
        "prompts": len(rows),
        "correct": fmean(known) if known else None,
        "completeness": {"max": max(errors), "mean": fmean(errors)} if errors else None,
        "evidence": _evidence([row for row in rows if row["evidence_first"] is not None]),
        "faithfulness": _faithfulness([row for row in rows if row["patch_top"] is not None]),
    }


def _evidence(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    return {
        "prompts": len(rows),
        "first": fmean(row["evidence_first"] for row in rows),
        "chance": fmean(row["evidence_chance"] for row in rows),
    }


def _faithfulness(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    percents = rows[0]["removed"]
    curves = {name: [fmean(at) for at in zip(*(row[name] for row in rows), strict=True)] for name in CURVES}
    return {
        "prompts": len(rows),
        "percents": percents,
        **curves,
        "area": {name: area(percents, curve) for name, curve in curves.items()},
    }
