"""The training timeline: one page with a slider over the steps of a run.

It is the report's page (`page.py`) with each prompt's scores and answers at every step. All steps share one
colour scale, so that growth is visible.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.reports.components import Grid
from depass_lightning.reports.numbers import visible
from depass_lightning.reports.page import PageFrames, page_html
from depass_lightning.reports.page_data import prompt_data
from depass_lightning.results.attribution import Attribution
from depass_lightning.utils.atomic_files import write_whole

CHANGING = ("value", "prediction", "probability", "rank", "share", "completeness")


@dataclass(frozen=True)
class Frame:
    """One step of a training.

    Attributes:
        label: the name at the slider: "step 120".
        step: the training step; the horizontal axis of the curves.
        attributions: the attributions by the prompt's id.
    """

    label: str
    step: float
    attributions: Mapping[str, Attribution]


def write_timeline(
    path: str | os.PathLike[str],
    frames: Sequence[Frame],
    *,
    title: str,
    subtitle: str = "",
    summary: Mapping[str, Any] | None = None,
    examples: Mapping[str, Mapping[str, Any]] | None = None,
    lines: Mapping[str, Sequence[tuple[float, ...]]] | None = None,
) -> None:
    """Write the page.

    Args:
        path: the page's file, written whole or not at all.
        frames: the steps, in order.
        title: the page's title.
        subtitle: a sentence below the title.
        summary: numbers shown as cards, see `write_page`.
        examples: what is known of each prompt, by its id, see `write_page`.
        lines: curves drawn below the slider, such as the loss: `(step, value)`, or with a band around it
            `(step, value, low, high)`.

    Raises:
        DePassError: there are fewer than two frames, or no prompt has the same components in all of them.
    """
    if len(frames) < 2:
        raise DePassError(
            f"a training timeline needs two steps or more; there {'is' if frames else 'are'} {len(frames)}"
        )
    ids = _common(frames)
    # These change with the step, and an example has them for one step only.
    changing = {"correct": None, "evidence_first": None}
    known = [{"id": id} | dict((examples or {}).get(id, {})) | changing for id in ids]
    by_prompt = [[frame.attributions[id] for frame in frames] for id in ids]
    data = {
        "labels": [visible(frame.label) for frame in frames],
        "steps": [frame.step for frame in frames],
        "lines": {name: [list(point) for point in points] for name, points in (lines or {}).items()},
        "frames": [_frames(steps, example) for steps, example in zip(by_prompt, known, strict=True)],
    }
    page = page_html(
        [steps[-1] for steps in by_prompt],
        title=title,
        subtitle=subtitle,
        summary=summary,
        examples=known,
        frames=PageFrames(data, by_prompt),
    )
    write_whole(path, page.encode("utf-8", errors="replace"))


def _common(frames: Sequence[Frame]) -> list[str]:
    """Return the ids of the prompts that every frame has, with the same components."""
    first, *others = frames
    ids = [
        id
        for id, attribution in first.attributions.items()
        if all(
            id in frame.attributions and frame.attributions[id].components == attribution.components
            for frame in others
        )
    ]
    if not ids:
        raise DePassError(
            "no prompt has attributions over the same components at every step; nothing to compare"
        )
    return ids


def _frames(attributions: Sequence[Attribution], example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the data of one prompt that differ between frames."""
    grids: list[Grid] = []
    frames = [prompt_data(example["id"], a, example, grids, attributions) for a in attributions]
    return [
        {name: frame[name] for name in CHANGING}
        | {"scores": {name: view["scores"] for name, view in frame["views"].items()}}
        for frame in frames
    ]
