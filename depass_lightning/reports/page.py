"""The report: one HTML file that shows every prompt of a run and needs nothing beside itself.

What a reader may do there is written in small scripts beside this file, one for each part of the page. A new
kind of picture is a script of its own that adds itself to `PANELS` (see `page_panels.js`), and what it draws
is a further entry of the data that `_prompt` collects.
"""

import base64
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from depass_lightning.errors import DePassError
from depass_lightning.reports.components import (
    Grid,
    complete,
    grid_of,
    made,
    mean_of,
    placed,
    remainders_of,
    strongest_of,
)
from depass_lightning.reports.matrices import matrices_of, shared_rows
from depass_lightning.reports.numbers import bare, curves_of, model_name, summary_cards, visible
from depass_lightning.reports.palette import DARK, LIGHT, css_variables
from depass_lightning.reports.prompt_segments import unread_words
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.attributions import Attributions
from depass_lightning.results.component import Component
from depass_lightning.utils.atomic_files import write_whole

SCRIPTS = (
    "page_base.js",
    "page_panels.js",
    "page_prompt.js",
    "page_matrix.js",
    "page_heat.js",
    "page_components.js",
    "page_mean.js",
    "page_facts.js",
    "page_curves.js",
    "page_list.js",
    "page_timeline.js",
    "page_start.js",
)
PICTURES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".webp": "image/webp"}


def write_page(
    path: str | os.PathLike[str],
    attributions: Sequence[Attribution],
    *,
    title: str,
    subtitle: str = "",
    summary: Mapping[str, Any] | None = None,
    figures: Sequence[Path] | None = None,
    examples: Sequence[Mapping[str, Any]] | None = None,
    mean: Attribution | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write the page of a run: its numbers, its curves, and each prompt with its tokens coloured by score.

    Args:
        path: where to write it; the file is written whole or not at all.
        attributions: one a prompt, in the order to show them first.
        title: what the page is about.
        subtitle: a sentence below it.
        summary: the run's numbers, as `summary_cards` reads them; its curves, if any, are drawn by the page
            itself, as `figures.curves_figure` describes them.
        figures: pictures to show below (.png, .svg), embedded in the page.
        examples: what is known of each prompt, as many as there are attributions: `id`; `answer`; `roles`,
            named character ranges of the prompt; `evidence`, the right tokens as names of roles or as
            character ranges; `evidence_first`, whether a right token has the largest score; `correct`,
            whether the model's own next token is the right answer, where that is known. Attributions that
            follow one another and have the same `matrix`, a name, are shown as the rows of one, each called
            by its `row`: they are several targets of one prompt.
        mean: the mean over the run's prompts, shown first where components stand for no text, such as heads;
            by default that of the given attributions.
        notes: what is known of components, by their names: the tokens that a neuron promotes.

    Raises:
        DePassError: if there are no attributions, not one example for each, or a figure of another kind.
    """
    page = page_html(
        attributions,
        title=title,
        subtitle=subtitle,
        summary=summary,
        figures=figures,
        examples=examples,
        mean=mean,
        notes=notes,
    )
    write_whole(path, page.encode("utf-8", errors="replace"))


def write_matrix_page(path: str | os.PathLike[str], attributions: Attributions, *, title: str) -> None:
    """Write the page of several targets of one prompt, or of all tokens of a generation.

    Args:
        path: where to write it; the file is written whole or not at all.
        attributions: one a target.
        title: what the page is about.
    """
    write_page(path, attributions, title=title, examples=matrix_examples(attributions))


def matrix_examples(attributions: Attributions, name: str = "matrix") -> list[dict[str, Any]]:
    """Return what a page must know of attributions to show them as one matrix.

    Args:
        attributions: one a target.
        name: what the matrix is called.
    """
    first = attributions.first_generated
    rows = attributions.targets if first is None else attributions.tokens[first:]
    return [{"id": f"{index + 1} {bare(row)}", "matrix": name, "row": row} for index, row in enumerate(rows)]


def page_html(
    attributions: Sequence[Attribution],
    *,
    title: str,
    subtitle: str = "",
    summary: Mapping[str, Any] | None = None,
    figures: Sequence[Path] | None = None,
    examples: Sequence[Mapping[str, Any]] | None = None,
    mean: Attribution | None = None,
    notes: Mapping[str, str] | None = None,
    timeline: Mapping[str, Any] | None = None,
    beside: Sequence[Sequence[Attribution]] | None = None,
) -> str:
    """Return the page that `write_page` writes, for a logger that takes HTML.

    Args:
        timeline: the same prompts at all steps (`timeline_page.py`); other arguments as for `write_page`.
        beside: each prompt's attributions at all steps, which show the same components.
    """
    if not attributions:
        raise DePassError("a page needs at least one attribution")
    if examples is not None and len(examples) != len(attributions):
        raise DePassError(f"{len(examples)} examples for {len(attributions)} attributions; give one for each")
    known = examples if examples is not None else [{}] * len(attributions)
    names = _distinct([str(example.get("id", f"prompt {i + 1}")) for i, example in enumerate(known)])
    steps = [own for each in beside or () for own in each]
    shared = _shared_settings(steps or attributions)
    grids: list[Grid] = []
    matrices = matrices_of([example.get("matrix") for example in known])
    together = dict(enumerate(beside or ()))
    together |= {row: attributions[slice(*matrix.rows)] for matrix in matrices for row in range(*matrix.rows)}
    prompts = [
        prompt_data(names[i], attribution, known[i], grids, together.get(i, ()))
        # What differs from step to step of a training timeline is what its slider says.
        | {"settings": {} if steps else _settings(attribution, without=shared)}
        for i, attribution in enumerate(attributions)
    ]
    data = {
        "prompts": shared_rows(prompts, matrices),
        "matrices": [{"name": visible(own.name), "rows": own.rows} for own in matrices],
        "mean": None if matrices else _mean(attributions, mean, grids),
        "grids": [grid_data(grid) for grid in grids],
        "notes": {visible(name): visible(note) for name, note in (notes or {}).items()},
        "curves": curves_of(summary or {}),
        "timeline": timeline,
    }
    script = joined(SCRIPTS)
    environment = Environment(
        loader=PackageLoader("depass_lightning", "reports/assets"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html.j2").render(
        title=visible(title),
        subtitle=visible(subtitle),
        settings=shared,
        cards=summary_cards(summary or {}),
        figures=[_figure(Path(figure)) for figure in figures or ()],
        data=embedded(data),
        notes=bool(notes),
        style=Markup(asset("page.css")),
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def prompt_data(
    name: str,
    attribution: Attribution,
    example: Mapping[str, Any],
    grids: list[Grid],
    together: Sequence[Attribution],
) -> dict[str, Any]:
    """Collect what the page shows of one prompt; a grid that no prompt before had is added to `grids`.

    What stands together, in a matrix or in a training timeline, shows the same components.
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
        "position": attribution.position,
        "stands": _stands(attribution),
        "row": visible(bare(str(example.get("row", name)))),
        "views": views,
        "marks": _marks(attribution, example) if known else [],
        "share": _rounded(attribution.positive_fraction(evidence))
        if known and evidence and placed(attribution)
        else None,
        "first": example.get("evidence_first"),
        "answer": visible(example.get("answer") or ""),
        "target": visible(attribution.target),
        "value": _rounded(attribution.value),
        "prediction": visible(attribution.prediction),
        "probability": _rounded(attribution.probability),
        "rank": attribution.rank,
        "right": example.get("correct"),
        "unread": unread_words(attribution),
        "completeness": _rounded(attribution.completeness) if complete(attribution) else None,
    }


def _stands(attribution: Attribution) -> int | None:
    """Return the place where the target's token stands in the text itself, as in what was generated."""
    following, target = attribution.position + 1, attribution.target_ids
    if following < len(attribution.tokens) and target == [attribution.token_ids[following]]:
        return following
    return None


def _view(
    attribution: Attribution, grids: list[Grid], together: Sequence[Attribution] = ()
) -> dict[str, Any]:
    """Collect the components as they are shown: in a grid, whose names all prompts share, or in a list."""
    grid = grid_of(attribution)
    shown = strongest_of(attribution, among=together)
    view = _components(shown)
    if grid is not None:
        if grid not in grids:
            grids.append(grid)
        view |= {"names": [], "spans": [], "grid": grids.index(grid)}
    elif not placed(attribution):
        view["remainders"] = remainders_of(shown)
        view["partial"] = attribution.groups > 1  # the strongest of several splits: no part of any one
    return view


def grid_data(grid: Grid) -> dict[str, Any]:
    """Return what a page's scripts know of a grid."""
    return {
        "layers": grid.layers,
        "columns": [visible(name) for name in grid.columns],
        "cells": grid.cells,
        "remainders": grid.remainders,
    }


def _mean(
    attributions: Sequence[Attribution], mean: Attribution | None, grids: list[Grid]
) -> dict[str, Any] | None:
    """Collect what the page shows of all prompts together, where their components are the same."""
    mean = mean or mean_of(attributions)
    return None if mean is None else {"value": _rounded(mean.value), "view": _view(mean, grids)}


def _components(attribution: Attribution) -> dict[str, Any]:
    """Collect the components' scores and places, and of names and texts what the tokens do not tell."""
    tokens = [visible(token) for token in attribution.tokens]
    names: list[str | None] = []
    texts: dict[int, str] = {}
    for i, component in enumerate(attribution.components):
        name, span = component.label, component.span
        text = None if span is None else visible(attribution.text_of(span))
        if span is not None and text is not None and text != "".join(tokens[slice(*span)]):
            texts[i] = text
        names.append(None if visible(name) == text else visible(name))
    scores = [_rounded(score) for score in attribution.scores.tolist()]
    return {"names": names, "texts": texts, "scores": scores, "spans": attribution.positions}


def _evidence_ranges(example: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the character ranges of the right tokens, whether they are given by role or outright."""
    roles = example.get("roles") or {}
    ranges: list[tuple[int, int]] = []
    for entry in example.get("evidence") or ():
        ranges += [tuple(span) for span in roles.get(entry, ())] if isinstance(entry, str) else [tuple(entry)]
    return ranges


def _marks(attribution: Attribution, example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the named ranges of a prompt as the token positions to underline, the right tokens first."""
    evidence = example.get("evidence") or ()
    roles = example.get("roles") or {}
    named = {name: (name in evidence, spans) for name, spans in roles.items()}
    outright = [span for span in evidence if not isinstance(span, str)]
    if outright:
        named["right tokens"] = (True, outright)
    texts = enumerate(attribution.tokens)
    components = [Component("token", text, index=i, span=(i, i + 1)) for i, text in texts]
    tokens = replace(attribution, scores=torch.zeros(len(components)), components=components)
    marks = [
        {"name": visible(name.replace("_", " ")), "right": right, "tokens": tokens.overlapping(spans)}
        for name, (right, spans) in named.items()
        if spans
    ]
    return sorted(marks, key=lambda mark: not mark["right"])


def _settings(attribution: Attribution, without: Iterable[str] = ()) -> dict[str, str]:
    """Return how an attribution was made, in words, less the settings named."""
    plain_values = {k: str(v) for k, v in attribution.metadata.items() if isinstance(v, str | int | float)}
    how = {"source": made(attribution), "rule": attribution.rule}
    if attribution.method != "depass":
        how["method"] = attribution.method
    if attribution.attention_path != "content":
        how["attention_path"] = attribution.attention_path
    settings = {"model": model_name(plain_values.pop("model", "unnamed"))} | how | plain_values
    return {name.replace("_", " "): visible(value) for name, value in settings.items() if name not in without}


def _shared_settings(attributions: Sequence[Attribution]) -> dict[str, str]:
    """Return the settings that all prompts of the page have in common."""
    first, *others = [_settings(attribution) for attribution in attributions]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the names that are not the first of their kind, since the page's address names the prompt."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return distinct


def _rounded(number: float | None) -> float | None:
    """Return a number with the five digits that a page needs, and None for NaN, which JSON lacks."""
    return None if number is None or not math.isfinite(number) else float(f"{number:.5g}")


def _figure(path: Path) -> dict[str, str]:
    """Return a picture as an address that holds it, and its name in words."""
    kind = PICTURES.get(path.suffix.lower())
    if kind is None:
        raise DePassError(f"{path.name} is no picture that a page can hold; give {', '.join(PICTURES)}")
    if not path.is_file():
        raise DePassError(f"there is no figure {path}")
    content = base64.b64encode(path.read_bytes()).decode()
    return {"source": f"data:{kind};base64,{content}", "name": path.stem.replace("_", " ")}


def embedded(data: Mapping[str, Any]) -> Markup:
    """Return data as JSON that cannot end the script element it stands in, whatever a token says."""
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return Markup(written)


def joined(scripts: Iterable[str]) -> str:
    """Return a page's scripts as one, none of whose names can be seen from outside."""
    parts = "\n".join(asset(name) for name in scripts)
    return f'"use strict";\n(() => {{\n{parts}\n}})();\n'


def asset(name: str) -> str:
    """Return the text of a file beside this one."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")
