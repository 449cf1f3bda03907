"""The data that a page's scripts read: prompts, components, grids and the mean over prompts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from depass_lightning.errors import DePassError
from depass_lightning.reports.answer_facts import answer_facts, prediction_name
from depass_lightning.reports.components import (
    Grid,
    complete,
    grid_of,
    mean_of,
    placed,
    remainders_of,
    repeats_of,
    strongest_of,
)
from depass_lightning.reports.numbers import bare, visible
from depass_lightning.reports.prompt_segments import prediction_place, unread_words
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.component import Component
from depass_lightning.utils.sections import tokens_of

LIKELY = 5  # next tokens at each position


def prompt_data(
    name: str,
    attribution: Attribution,
    example: Mapping[str, Any],
    grids: list[Grid],
    together: Sequence[Attribution],
) -> dict[str, Any]:
    """Return the page's data of one prompt.

    Args:
        name: the prompt's name.
        attribution: its attribution.
        example: what is known of the prompt, see `write_page`.
        grids: the page's grids; a new one is added.
        together: the attributions of the same matrix or training timeline, which show the same components.
    """
    words = attribution.words()
    views = {"tokens": _view(attribution, grids, together)}
    if len(words) < len(attribution):
        views["words"] = _components(words)
    evidence = _evidence_ranges(example)
    known = attribution.offsets is not None and bool(attribution.text)
    return {
        "id": visible(name),
        "tokens": [visible(token) for token in attribution.tokens],
        "special": [i for i, (start, end) in enumerate(attribution.offsets or ()) if start == end],
        "position": attribution.last,
        "read": prediction_place(attribution),
        "target_position": _target_position(attribution),
        "row": visible(bare(str(example.get("row", name)))),
        "views": views,
        "sections": _sections(attribution),
        "citations": _citations(attribution),
        "marks": _marks(attribution, example) if known else [],
        "share": rounded(attribution.positive_fraction(evidence))
        if known and evidence and placed(attribution)
        else None,
        "first": example.get("evidence_first"),
        "answer": visible(example.get("answer") or ""),
        "target": visible(attribution.target),
        "value": rounded(attribution.value),
        "prediction": visible(attribution.prediction),
        "predicted": prediction_name(attribution),
        "answer_start": attribution.answer_start,
        "likely": [
            [[visible(token["text"]), rounded(token["probability"])] for token in tokens[:LIKELY]]
            for tokens in example.get("likely") or ()
        ],
        "layers": [[rounded(score) for score in scores] for scores in example.get("layers") or ()],
        "facts": answer_facts(attribution),
        "probability": rounded(attribution.probability),
        "rank": attribution.rank,
        "right": example.get("correct"),
        "unread": unread_words(attribution),
        "completeness": rounded(attribution.completeness) if complete(attribution) else None,
    }


def _sections(attribution: Attribution) -> list[dict[str, Any]]:
    """Return the turns of a conversation, or the documents of a prompt, as token ranges.

    A turn is `kind` turn or answer; of a prompt without turns the sections are documents and the question.
    """
    kinds = {section.kind for section in attribution.sections}
    outer = ("turn", "answer") if "turn" in kinds else ("document", "question", "answer")
    chosen = sorted(
        (part for part in attribution.sections if part.kind in outer), key=lambda part: part.start
    )
    tokens = tokens_of(chosen, attribution.text, attribution.offsets or [])
    return [
        {"kind": part.kind, "name": visible(part.name), "tokens": [positions[0], positions[-1] + 1]}
        for part, positions in zip(chosen, tokens, strict=True)
        if positions
    ]


def _citations(attribution: Attribution, most: int = 3) -> list[dict[str, Any]]:
    """Return the best citations of documents; none where components are more than sentences, or not text."""
    if not any(section.kind == "document" for section in attribution.sections) or not placed(attribution):
        return []
    try:
        cited = attribution.cite(most)
    except DePassError:  # a component has several sentences
        return []
    return [
        {"document": visible(name), "text": visible(text), "score": rounded(score), "tokens": span}
        for name, text, score, span in cited
    ]


def _target_position(attribution: Attribution) -> int | None:
    """Return the position of the target's token if it is part of the text, as in a generated text."""
    following, target = attribution.last + 1, attribution.target_ids
    if following < len(attribution.tokens) and target == [attribution.token_ids[following]]:
        return following
    return None


def _view(
    attribution: Attribution, grids: list[Grid], together: Sequence[Attribution] = ()
) -> dict[str, Any]:
    """Return the components' data: in a grid, whose names all prompts share, or in a list."""
    grid = grid_of(attribution)
    shown = strongest_of(attribution, among=together)
    view = _components(shown)
    if grid is not None:
        if grid not in grids:
            grids.append(grid)
        view |= {"names": [], "spans": [], "grid": grids.index(grid)}
    elif not placed(attribution):
        view["remainders"] = remainders_of(shown)
        view["partial"] = attribution.groups > 1  # the strongest of several groups: no share of any one
    return view


def grid_data(grid: Grid) -> dict[str, Any]:
    """Return a grid's data for the page's scripts.

    Args:
        grid: the grid.
    """
    return {
        "layers": grid.layers,
        "columns": [visible(name) for name in grid.columns],
        "cells": grid.cells,
        "remainders": grid.remainders,
    }


def mean_data(
    attributions: Sequence[Attribution], mean: Attribution | None, grids: list[Grid]
) -> dict[str, Any] | None:
    """Return the page's data of the mean over prompts; None if the components depend on the text.

    Args:
        attributions: one per prompt.
        mean: their mean, if it is known.
        grids: the page's grids; a new one is added.
    """
    mean = mean or mean_of(attributions)
    return None if mean is None else {"value": rounded(mean.value), "view": _view(mean, grids)}


def _components(attribution: Attribution) -> dict[str, Any]:
    """Return the components' scores and spans, and the names and texts that differ from the tokens."""
    tokens = [visible(token) for token in attribution.tokens]
    names: list[str | None] = []
    texts: dict[int, str] = {}
    for i, component in enumerate(attribution.components):
        name, span = component.label, component.span
        text = None if span is None else visible(attribution.text_of(span))
        if span is not None and text is not None and text != "".join(tokens[slice(*span)]):
            texts[i] = text
        names.append(None if visible(name) == text else visible(name))
    scores = [rounded(score) for score in attribution.scores.tolist()]
    repeats = repeats_of(attribution)
    data = {"names": names, "texts": texts, "scores": scores, "spans": attribution.positions}
    return data | ({"repeats": repeats} if repeats else {})


def _evidence_ranges(example: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the character ranges of the evidence, given by role or as ranges."""
    roles = example.get("roles") or {}
    ranges: list[tuple[int, int]] = []
    for entry in example.get("evidence") or ():
        ranges += [tuple(span) for span in roles.get(entry, ())] if isinstance(entry, str) else [tuple(entry)]
    return ranges


def _marks(attribution: Attribution, example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the named ranges of a prompt as the token positions to underline, the evidence first."""
    evidence = example.get("evidence") or ()
    roles = example.get("roles") or {}
    named = {name: (name in evidence, spans) for name, spans in roles.items()}
    ranges = [span for span in evidence if not isinstance(span, str)]
    if ranges:
        named["evidence"] = (True, ranges)
    texts = enumerate(attribution.tokens)
    components = [Component("token", text, index=i, span=(i, i + 1)) for i, text in texts]
    tokens = replace(attribution, scores=torch.zeros(len(components)), components=components)
    marks = [
        {"name": visible(name.replace("_", " ")), "right": right, "tokens": tokens.overlapping(spans)}
        for name, (right, spans) in named.items()
        if spans
    ]
    return sorted(marks, key=lambda mark: not mark["right"])


def rounded(number: float | None) -> float | None:
    """Return a number with five digits; None for NaN, which JSON lacks.

    Args:
        number: the number.
    """
    return None if number is None or not math.isfinite(number) else float(f"{number:.5g}")
