"""The training timeline: one page with a slider over the steps of a run, or over several models.

It is the report's page (`page.py`) with one more thing in it: what each prompt's scores and answers were at
every other step. Colours have one scale over all steps, so that what grows is seen to grow.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.reports.components import Grid
from depass_lightning.reports.numbers import visible
from depass_lightning.reports.page import page_html, prompt_data
from depass_lightning.results.attribution import Attribution
from depass_lightning.utils.atomic_files import write_whole

CHANGING = ("value", "prediction", "probability", "rank", "share", "completeness")


@dataclass(frozen=True)
class Frame:
    """One step of a training, or one model among several.

    Attributes:
        label: what it is called, as "step 120".
        at: where it stands among the others; steps for a training.
        attributions: of each prompt, by its id.
    """

    label: str
    at: float
    attributions: Mapping[str, Attribution]


def write_timeline(
    path: str | os.PathLike[str],
    frames: Sequence[Frame],
    *,
    title: str,
    subtitle: str = "",
    summary: Mapping[str, Any] | None = None,
    examples: Mapping[str, Mapping[str, Any]] | None = None,
    lines: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """Write the page.

    Args:
        path: where to write it; the file is written whole or not at all.
        frames: the steps, in order.
        title: what the page is about.
        subtitle: a sentence below it.
        summary: numbers shown as cards, as for `write_page`.
        examples: what is known of each prompt, by its id, as for `write_page`.
        lines: curves drawn beside the slider, such as the loss: `(step, value)`.

    Raises:
        DePassError: there are fewer than two frames, or no prompt that all of them have with the same
            components.
    """
    if len(frames) < 2:
        raise DePassError(
            f"a training timeline needs two steps or more; there {'is' if frames else 'are'} {len(frames)}"
        )
    ids = _common(frames)
    # Whether the model is right changes from step to step, and an example knows it of one step.
    known = [{"id": id} | dict((examples or {}).get(id, {})) | {"correct": None} for id in ids]
    beside = [[frame.attributions[id] for frame in frames] for id in ids]
    timeline = {
        "labels": [visible(frame.label) for frame in frames],
        "at": [frame.at for frame in frames],
        "lines": {name: [list(point) for point in points] for name, points in (lines or {}).items()},
        "prompts": [_frames(own, example) for own, example in zip(beside, known, strict=True)],
    }
    page = page_html(
        [own[-1] for own in beside],
        title=title,
        subtitle=subtitle,
        summary=summary,
        examples=known,
        timeline=timeline,
        beside=beside,
    )
    write_whole(path, page.encode("utf-8", errors="replace"))


def _common(frames: Sequence[Frame]) -> list[str]:
    """The prompts that every frame has, over the same components."""
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
            "no prompt was explained at every step over the same components; nothing to compare"
        )
    return ids


def _frames(attributions: Sequence[Attribution], example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What changes of one prompt from frame to frame."""
    grids: list[Grid] = []
    each = [prompt_data(example["id"], own, example, grids, attributions) for own in attributions]
    return [
        {name: own[name] for name in CHANGING}
        | {"scores": {name: view["scores"] for name, view in own["views"].items()}}
        for own in each
    ]
