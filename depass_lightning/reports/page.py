"""The report: one self-contained HTML file that shows every prompt of a run.

The scripts in `assets/` draw the page, one for each part of it. A new kind of figure is a script that adds
itself to `PANELS` (see `page_panels.js`) and reads a further entry of `page_data.prompt_data`.
"""

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from depass_lightning.errors import DePassError
from depass_lightning.reports.components import Grid, made
from depass_lightning.reports.matrices import matrices_of, shared_rows
from depass_lightning.reports.numbers import (
    bare,
    curves_of,
    measure_name,
    model_name,
    summary_cards,
    visible,
)
from depass_lightning.reports.page_data import grid_data, mean_data, prompt_data
from depass_lightning.reports.palette import DARK, LIGHT, css_variables
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.attributions import Attributions
from depass_lightning.utils.atomic_files import write_whole

SCRIPTS = (
    "page_base.js",
    "page_panels.js",
    "page_prompt.js",
    "page_sections.js",
    "page_matrix.js",
    "page_heat.js",
    "page_compare.js",
    "page_layers.js",
    "page_components.js",
    "page_mean.js",
    "page_facts.js",
    "page_curves.js",
    "page_list.js",
    "page_timeline.js",
    "page_start.js",
)
PICTURES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".webp": "image/webp"}


@dataclass(frozen=True)
class SharedComponents:
    """What a page shows of components that are the same for all prompts, such as heads.

    Attributes:
        mean: their mean attribution over the run's prompts; by default over the page's.
        notes: notes on components by label: the tokens that a neuron promotes.
    """

    mean: Attribution | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PageFrames:
    """The steps that a page's slider shows.

    Attributes:
        data: what the page's script reads (`timeline_page.py`).
        attributions: of each prompt the attributions at all steps, over the same components.
    """

    data: Mapping[str, Any]
    attributions: Sequence[Sequence[Attribution]]


def write_page(
    path: str | os.PathLike[str],
    attributions: Sequence[Attribution],
    *,
    title: str,
    subtitle: str = "",
    summary: Mapping[str, Any] | None = None,
    figures: Sequence[Path] | None = None,
    examples: Sequence[Mapping[str, Any]] | None = None,
    components: SharedComponents | None = None,
) -> None:
    """Write the page of a run: its numbers, its curves, and each prompt with its tokens coloured by score.

    Args:
        path: the page's file, written whole or not at all.
        attributions: one per prompt, in the order in which they are listed at first.
        title: the page's title.
        subtitle: a sentence below the title.
        summary: the run's numbers, see `summary_cards`; the page draws its curves, see
            `figures.curves_figure`.
        figures: image files (.png, .svg) to embed at the end.
        examples: one per attribution: `id`; `answer`; `roles`, named character ranges of the prompt;
            `evidence`, as names of roles or as character ranges; `evidence_first`, whether a token of the
            evidence has the largest score; `correct`, whether the model's next token is the correct answer,
            if known; `likely` and `layers`, see `logit_lens.PageLens`.
            Consecutive attributions with the same `matrix`, a name, are shown as the rows of one
            matrix, each labelled by its `row`: they are several targets of one prompt.
        components: the mean over prompts, shown first where components are not positions of the text, and
            notes on components.

    Raises:
        DePassError: there are no attributions, not one example for each, or a figure has another format.
    """
    page = page_html(
        attributions,
        title=title,
        subtitle=subtitle,
        summary=summary,
        figures=figures,
        examples=examples,
        components=components,
    )
    write_whole(path, page.encode("utf-8", errors="replace"))


def write_matrix_page(path: str | os.PathLike[str], attributions: Attributions, *, title: str) -> None:
    """Write the page of several targets of one prompt, or of all tokens of a generation.

    Args:
        path: the page's file, written whole or not at all.
        attributions: one per target.
        title: the page's title.
    """
    write_page(path, attributions, title=title, examples=matrix_examples(attributions))


def matrix_examples(attributions: Attributions, name: str = "matrix") -> list[dict[str, Any]]:
    """Return the examples of attributions that a page shows as one matrix.

    Args:
        attributions: one per target.
        name: the matrix's name.
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
    components: SharedComponents | None = None,
    frames: PageFrames | None = None,
) -> str:
    """Return the page that `write_page` writes, for a logger that takes HTML.

    Args:
        attributions: see `write_page`.
        title: see `write_page`.
        subtitle: see `write_page`.
        summary: see `write_page`.
        figures: see `write_page`.
        examples: see `write_page`.
        components: see `write_page`.
        frames: the same prompts at all steps, for a slider.

    Raises:
        DePassError: see `write_page`.
    """
    data, shared = page_contents(
        attributions, summary=summary, examples=examples, components=components, frames=frames
    )
    return rendered(
        "page",
        joined(SCRIPTS),
        data,
        title=visible(title),
        subtitle=visible(subtitle),
        settings=shared,
        cards=summary_cards(summary or {}),
        table=None,
        figures=[_figure(Path(figure)) for figure in figures or ()],
        notes=bool(data["notes"]),
        style=Markup(asset("page.css")),
    )


def page_contents(
    attributions: Sequence[Attribution],
    *,
    summary: Mapping[str, Any] | None = None,
    examples: Sequence[Mapping[str, Any]] | None = None,
    components: SharedComponents | None = None,
    frames: PageFrames | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a page's scripts read, and the settings that all of its prompts share.

    Args:
        attributions: see `write_page`.
        summary: see `write_page`.
        examples: see `write_page`.
        components: see `write_page`.
        frames: see `page_html`.

    Raises:
        DePassError: there are no attributions, or not one example for each.
    """
    if not attributions:
        raise DePassError("a page needs at least one attribution")
    if examples is not None and len(examples) != len(attributions):
        raise DePassError(f"{len(examples)} examples for {len(attributions)} attributions; give one for each")
    known = examples if examples is not None else [{}] * len(attributions)
    by_prompt = frames.attributions if frames is not None else ()
    shared = _shared_settings([a for steps in by_prompt for a in steps] or attributions)
    grids: list[Grid] = []
    matrices = matrices_of([example.get("matrix") for example in known])
    together = dict(enumerate(by_prompt))
    together |= {row: attributions[slice(*matrix.rows)] for matrix in matrices for row in range(*matrix.rows)}
    prompts = [
        prompt_data(name, attribution, known[i], grids, together.get(i, ()))
        # What differs between the steps of a training timeline is shown at its slider.
        | {"settings": {} if frames is not None else _settings(attribution, without=shared)}
        for i, (name, attribution) in enumerate(zip(_names(known), attributions, strict=True))
    ]
    components = components or SharedComponents()
    curves = curves_of(summary or {})
    return {
        "prompts": shared_rows(prompts, matrices),
        "matrices": [{"name": visible(matrix.name), "rows": matrix.rows} for matrix in matrices],
        "mean": None if matrices else mean_data(attributions, components.mean, grids),
        "grids": [grid_data(grid) for grid in grids],
        "notes": {visible(name): visible(note) for name, note in components.notes.items()},
        "curves": curves,
        "measures": {name: measure_name(name) for name in curves},
        "timeline": None if frames is None else frames.data,
    }, shared


def rendered(template: str, script: str, data: Mapping[str, Any], **values: Any) -> str:
    """Return a page as HTML.

    Args:
        template: the template's name in `assets/`, without its suffix.
        script: the page's script, see `joined`.
        data: what the script reads.
        values: the template's other variables.
    """
    environment = Environment(
        loader=PackageLoader("depass_lightning", "reports/assets"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(f"{template}.html.j2").render(
        data=_embedded(data),
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def _settings(attribution: Attribution, without: Iterable[str] = ()) -> dict[str, str]:
    """Return an attribution's settings as text, except those named."""
    plain_values = {
        k: f"{v:.5g}".replace("-", "−") if isinstance(v, float) else str(v)
        for k, v in attribution.metadata.items()
        if isinstance(v, str | int | float) and not isinstance(v, bool)
    }
    how = {"source": made(attribution), "rule": attribution.rule}
    if attribution.method != "depass":
        how["method"] = attribution.method
    if attribution.attention_path != "content":
        how["attention_path"] = attribution.attention_path
    settings = {"model": model_name(plain_values.pop("model", "unnamed"))} | how | plain_values
    written = {setting_name(name): visible(value) for name, value in settings.items()}
    return {name: value for name, value in written.items() if name not in without}


def setting_name(key: str) -> str:
    """Return a setting's name for a reader.

    Args:
        key: its name in an attribution's metadata.
    """
    return key.replace("_", " ").replace("log probability", "log-probability")


def _shared_settings(attributions: Sequence[Attribution]) -> dict[str, str]:
    """Return the settings that all prompts of the page have in common."""
    first, *others = [_settings(attribution) for attribution in attributions]
    return {
        key: value
        for key, value in first.items()
        # A log-probability is a prompt's number, also where there is one prompt.
        if "log-probability" not in key and all(other.get(key) == value for other in others)
    }


def _names(examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the prompts' names; repeated ones are numbered, because the page's address contains the name."""
    seen: Counter[str] = Counter()
    names = []
    for number, example in enumerate(examples, start=1):
        name = str(example.get("id", f"prompt {number}"))
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def _figure(path: Path) -> dict[str, str]:
    """Return an image as a data URL, and its name."""
    kind = PICTURES.get(path.suffix.lower())
    if kind is None:
        raise DePassError(f"{path.name}: a page cannot embed this format; give {', '.join(PICTURES)}")
    if not path.is_file():
        raise DePassError(f"there is no figure {path}")
    content = base64.b64encode(path.read_bytes()).decode()
    return {"source": f"data:{kind};base64,{content}", "name": path.stem.replace("_", " ")}


def _embedded(data: Mapping[str, Any]) -> Markup:
    """Return data as JSON that cannot end its script element, whatever a token contains."""
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return Markup(written)


def joined(scripts: Iterable[str]) -> str:
    """Return scripts of `assets/` as one, with no global names.

    Args:
        scripts: their file names, in order.
    """
    parts = "\n".join(asset(name) for name in scripts)
    return f'"use strict";\n(() => {{\n{parts}\n}})();\n'


def asset(name: str) -> str:
    """Return the text of a file in `assets/`."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")
