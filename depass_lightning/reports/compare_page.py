"""The comparison page: each prompt under two or more models, checkpoints, rules, methods or texts, stacked.

Components are matched with those of the first attribution. Where the texts differ, only tokens that both
have are compared.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any

from markupsafe import Markup

from depass_lightning.errors import DePassError
from depass_lightning.reports.components import Grid, mean_of, placed
from depass_lightning.reports.numbers import amount, measure_name, visible
from depass_lightning.reports.page import SCRIPTS, asset, joined, rendered
from depass_lightning.reports.page_data import grid_data, mean_data, prompt_data, rounded
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.comparison import Comparison, compare_scores
from depass_lightning.utils.atomic_files import write_whole

Indices = list[int | None]


def write_compare_page(
    path: str | os.PathLike[str],
    prompts: Mapping[str, Sequence[Attribution]],
    labels: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    examples: Mapping[str, Mapping[str, Any]] | None = None,
    table: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the page.

    Args:
        path: the page's file, written whole or not at all.
        prompts: each prompt's attributions by its id, the one that the others are compared with first.
        labels: the name of each attribution's model, rule or other setting.
        title: the page's title.
        subtitle: a sentence below the title.
        examples: what is known of each prompt, by its id, see `write_page`.
        table: the aggregates, a row for each label: its numbers by their names in a summary.

    Raises:
        DePassError: two attributions of one prompt cannot be compared.
    """
    grids: list[Grid] = []
    known = examples or {}
    data = {
        "prompts": [
            compared_data(id, attributions, labels, grids, known.get(id, {}))
            for id, attributions in prompts.items()
        ],
        "matrices": [],
        "mean": _mean_change(list(prompts.values()), grids),
        "grids": [grid_data(grid) for grid in grids],
        "notes": {},
        "curves": {},
        "measures": {},
        "timeline": None,
    }
    names = list(dict.fromkeys(name for row in table for name, value in row.items() if value is not None))
    page = rendered(
        "page",
        joined(SCRIPTS),
        data,
        title=visible(title),
        subtitle=visible(subtitle),
        settings={},
        cards=(),
        table={
            "columns": [measure_name(name) for name in names],
            "rows": [
                (visible(label), ["" if row.get(name) is None else amount(name, row[name]) for name in names])
                for label, row in zip(labels, table, strict=False)
            ],
        },
        figures=(),
        notes=False,
        style=Markup(asset("page.css")),
    )
    write_whole(path, page.encode("utf-8", errors="replace"))


def compared_data(
    name: str,
    attributions: Sequence[Attribution],
    labels: Sequence[str],
    grids: list[Grid],
    example: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the page's data of one prompt: its `rows`, and the last one's difference from the first.

    Args:
        name: the prompt's name.
        attributions: the one that the others are compared with, and these.
        labels: the name of each.
        grids: the page's grids; new ones are added.
        example: what is known of the prompt, see `write_page`.

    Raises:
        DePassError: an attribution cannot be compared with the first.
    """
    first, *others = attributions
    comparisons = [compared(first, other) for other in others]
    # What the page says of one row is not known of the others.
    known = dict(example) | {"correct": None, "evidence_first": None}
    rows = [prompt_data(name, a, known, grids, attributions) for a in attributions]
    views = [view for view in ("tokens", "words") if all(view in row["views"] for row in rows)]
    # Scores of different methods have different units.
    relative = len({a.method for a in attributions}) > 1
    changed = {}
    for view in views:
        matched = _matched([a if view == "tokens" else a.words() for a in attributions])
        names = _match(rows, view, matched, relative=relative)
        last = rows[-1]["views"][view]
        changed[view] = last | {"names": names, "scores": last["change"], "partial": True}
    for row, label in zip(rows, labels, strict=True):
        row |= {"label": visible(label), "views": {view: row["views"][view] for view in views}}
    return rows[-1] | {
        "views": changed,
        "rows": rows,
        "relative": relative,
        "value": rounded(attributions[-1].value - first.value),
        # Rounded: equal scores would otherwise be listed with a change of 2e-16.
        "change": max([0.0, *(round(1 - comparison.cosine, 6) for comparison in comparisons)]),
        "rank": None,
        "settings": {},
    }


def compared(first: Attribution, other: Attribution) -> Comparison:
    """Compare two attributions over the components that both have.

    Args:
        first: the attribution before.
        other: the attribution after.

    Raises:
        DePassError: they have other kinds of components, or no token in common.
    """
    pairs = _pairs(first, other)
    if not any(_is_word(first, i) and _is_word(other, j) for i, j in pairs):
        raise DePassError(f"the prompts {first.text!r:.60} and {other.text!r:.60} have no token in common")
    before, after = [i for i, _ in pairs], [j for _, j in pairs]
    names = [first.names[i] for i in before]
    return compare_scores(names, first.scores[before], names, other.scores[after])


def _pairs(first: Attribution, other: Attribution) -> list[tuple[int, int]]:
    """Return the indices of the components that two attributions share."""
    if first.components == other.components:
        return [(i, i) for i in range(len(first))]
    if first.source != other.source:
        raise DePassError(f"scores of {first.source} cannot be compared with scores of {other.source}")
    if not (placed(first) and placed(other)):
        raise DePassError(
            f"the scores of {first.source} are of different {first.source} ({len(first)} and {len(other)}); "
            "compare the same layers of models of one size"
        )
    keys = [[component.label.strip() for component in a.components] for a in (first, other)]
    blocks = SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks()
    return [(block.a + k, block.b + k) for block in blocks for k in range(block.size)]


def _is_word(attribution: Attribution, index: int) -> bool:
    """Return whether a component is no special token and no constant next to tokens."""
    span = attribution.positions[index]
    if span is None or attribution.offsets is None:
        return span is not None or not placed(attribution)
    return any(start < end for start, end in attribution.offsets[slice(*span)])


def _matched(attributions: Sequence[Attribution]) -> list[Indices]:
    """Return each attribution's indices for one list of all components; None where it lacks one.

    The list begins with the first attribution's components; those that it lacks follow.
    """
    first, *others = attributions
    rows: list[Indices] = [list(range(len(first)))]
    for other in others:
        partner = dict(_pairs(first, other))
        alone = sorted(set(range(len(other))) - set(partner.values()))
        gap = [None] * (len(rows[0]) - len(first))
        rows = [row + [None] * len(alone) for row in rows]
        rows.append([*map(partner.get, range(len(first))), *gap, *alone])
    return rows


def _match(
    rows: Sequence[dict[str, Any]], name: str, matched: Sequence[Indices], *, relative: bool
) -> list[str | None]:
    """Rewrite a view of each row over one list of components, and add each one's `change` from the first.

    Returns:
        The components' names.
    """
    views = [row["views"][name] for row in rows]
    names: list[str | None] = list(views[0]["names"])
    if any(views[0]["spans"]):
        names = [None] * len(matched[0])
        for row, view, indices in zip(rows, views, matched, strict=True):
            place = {i: k for k, i in enumerate(indices) if i is not None}
            for i, k in place.items():
                span = view["spans"][i] or (0, 0)
                text = view["texts"].get(i, "".join(row["tokens"][slice(*span)]))
                names[k] = names[k] or view["names"][i] or text
            for key in ("names", "scores", "spans"):
                view[key] = [None if i is None else view[key][i] for i in indices]
            for key in ("texts", "repeats"):
                view[key] = {place[i]: text for i, text in view.get(key, {}).items()}
    shared = []
    for view in views:
        scale = max((abs(score) for score in view["scores"] if score is not None), default=0) or 1
        shared.append([s if s is None or not relative else s / scale for s in view["scores"]])
    for view, scores in zip(views, shared, strict=True):
        pairs = zip(shared[0], scores, strict=True)
        view["change"] = [None if a is None or b is None else rounded(b - a) for a, b in pairs]
    return names


def _mean_change(prompts: Sequence[Sequence[Attribution]], grids: list[Grid]) -> dict[str, Any] | None:
    """Return the data of the mean change from the first to the last attribution; None for tokens."""
    before, after = (mean_of([attributions[k] for attributions in prompts]) for k in (0, -1))
    if before is None or after is None or before.method != after.method:
        return None
    change = replace(after, scores=after.scores - before.scores, value=after.value - before.value)
    return mean_data([], change, grids)
