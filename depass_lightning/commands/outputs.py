"""The output files of an analysis (summary, page, figures) and its terminal output."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from depass_lightning.faithfulness import summarise
from depass_lightning.logit_lens import PageLens
from depass_lightning.reports.component_figures import attribution_figure
from depass_lightning.reports.components import asked_for, complete, mean_of, strongest_of
from depass_lightning.reports.figures import curves_figure, save_figure
from depass_lightning.reports.matrix import score_matrix
from depass_lightning.reports.numbers import curves_of
from depass_lightning.reports.page import SharedComponents, write_page
from depass_lightning.reports.terminal import attribution_text, attributions_table, summary_table
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.component import Component
from depass_lightning.results.generation import Generation
from depass_lightning.storage import RowFile, attribution_from_row, checked_file, write_json

NOTED = 300  # components with notes on the page, the ones most often among the strongest


@dataclass(frozen=True)
class Results:
    """The results of a finished analysis.

    Attributes:
        folder: the run's folder.
        rows: one row per prompt, or per generated token, in the task's order.
        summary: the content of `summary.json`.
        page: the path of the report; None if no prompt could be attributed.
        generated: whether each row is a generated token.
    """

    folder: Path
    rows: RowFile
    summary: Mapping[str, Any]
    page: Path | None
    generated: bool = False


def write_results(
    folder: Path,
    table: Path,
    *,
    about: Mapping[str, Any],
    title: str,
    subtitle: str,
    size: DictConfig,
    lens: PageLens | None = None,
    generated: bool = False,
) -> Results:
    """Write the summary, the page and the figures of a run.

    Args:
        folder: the run's folder.
        table: the Parquet file of its rows.
        about: further entries of the summary: model, settings, versions, time.
        title: the page's title.
        subtitle: the line below the title.
        size: how many of the first prompts are on the page (`prompts`) and drawn as figures (`figures`), and
            whether the page shows them at every layer (`lens`).
        lens: returns what the page shows of the model, such as the tokens that a neuron promotes.
        generated: whether each row is a generated token; the rows of a prompt are consecutive.
    """
    rows = RowFile(table)
    mean = mean_of(attribution_from_row(row) for row in rows)
    counts = _lengths(RowFile(table, ["id"])) if generated else [1] * len(rows)
    summary = {**_summary(rows, counts), **_rounding(rows), **_mean_scores(mean), **about}
    with checked_file(folder / "summary.json") as draft:
        write_json(draft, summary)
    page = folder / "report.html"
    if not len(rows):
        page.unlink(missing_ok=True)  # of an earlier run
        return Results(folder, rows, summary, None)
    first = rows.first(sum(counts[: size.prompts]))
    shown = [attribution_from_row(row) for row in first]
    if not generated:
        _draw(folder / "figures", summary, first, shown[: size.figures], mean)
    if len(counts) > size.prompts:
        subtitle = f"{subtitle}; the first {size.prompts:,} of {len(counts):,} prompts".lstrip("; ")
    examples = [example_of(row) for row in first]
    if lens is not None and size.lens:
        examples = [example | lens.prompt(a) for example, a in zip(examples, shown, strict=True)]
    if generated:
        examples = [example | _in_matrix(row) for example, row in zip(examples, first, strict=True)]
    write_page(
        page,
        shown,
        title=title,
        subtitle=subtitle,
        summary=_shown(summary),
        examples=examples,
        components=SharedComponents(
            mean, {} if lens is None or mean is None else lens.notes(_leading_components([mean, *shown]))
        ),
    )
    return Results(folder, rows, summary, page, generated)


def print_results(results: Results, console: Console, prompts: int = 6) -> None:
    """Print a run: the first prompt in colour, a table of several prompts, and the run's numbers."""
    most = prompts
    if results.generated and len(results.rows):
        most = _lengths(RowFile(results.rows.path, ["id"]))[0]
    shown = [attribution_from_row(row) for row in results.rows.first(most)]
    if shown and results.generated:
        generation = Generation(shown)
        console.print(f"\n{generation.text}\n", markup=False, highlight=False)
        console.print(score_matrix(generation, console.width))
    elif shown:
        console.print()
        console.print(attribution_text(shown[0], top=5))
        console.print()
        if len(shown) > 1:
            console.print(attributions_table(shown, width=console.width))
    console.print(summary_table(_shown(results.summary)))
    console.print()
    if results.page is not None:
        _print_path(console, "page", results.page)
    _print_path(console, "folder", results.folder)


def _lengths(rows: Iterable[Mapping[str, Any]]) -> list[int]:
    """Return how many tokens were generated after each prompt."""
    prompts = groupby(rows, key=lambda row: row["id"].rpartition("/")[0])
    return [sum(1 for _ in tokens) for _, tokens in prompts]


def _in_matrix(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a generated token's place on the page: its prompt's matrix, and the text of its row."""
    return {"matrix": row["id"].rpartition("/")[0], "row": row["tokens"][row["position"] + 1]}


def _summary(rows: RowFile, counts: Sequence[int]) -> dict[str, Any]:
    """Return the run's numbers; without completeness errors if the scores are not meant to be complete."""
    summary = summarise(rows)
    if len(counts) < len(rows):
        counted = {"prompts": len(counts), "generated_tokens": len(rows)}
        summary = {**counted, **summary, **counted}  # in this order
    if len(rows) and not complete(attribution_from_row(rows.first(1)[0])):
        summary = {key: value for key, value in summary.items() if not key.startswith("completeness")}
    return summary


def _rounding(rows: RowFile) -> dict[str, Any]:
    """Return the size of the model's rounding error, if it computes in lower precision than DePass."""
    shares = []
    for row in RowFile(rows.path, ["value", "kinds", "scores"]):
        largest = max(abs(row["value"]), *map(abs, row["scores"]))
        kinds = zip(row["kinds"], row["scores"], strict=True)
        errors = [abs(score) for kind, score in kinds if kind == "rounding"]
        if errors and largest:
            shares.append(max(errors) / largest)
    if not shares:
        return {}
    return {"rounding": {"value": max(shares), "note": "of the value or the largest score, worst prompt"}}


def _mean_scores(mean: Attribution | None) -> dict[str, Any]:
    """Return the mean scores of components that all prompts share, the strongest ones if there are many."""
    if mean is None:
        return {}
    listed = strongest_of(mean)
    return {"mean_scores": dict(zip(listed.names, listed.scores.tolist(), strict=True))}


def _leading_components(attributions: Sequence[Attribution]) -> list[Component]:
    """Return the components that are most often among a prompt's strongest."""
    counts: Counter[Component] = Counter()
    for attribution in map(asked_for, attributions):
        counts.update(attribution.components[i] for i in attribution.ranked(12, absolute=True))
    return [component for component, _ in counts.most_common(NOTED)]


def number_of(entry: Any) -> float | None:
    """Return a number of a summary, or its mean over prompts; None for other entries."""
    if isinstance(entry, Mapping):
        entry = entry.get("value")
    return float(entry) if isinstance(entry, int | float) and not isinstance(entry, bool) else None


def _shown(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary, without the number of skipped prompts if it is zero."""
    return {key: value for key, value in summary.items() if key != "skipped" or value}


def _print_path(console: Console, name: str, path: Path) -> None:
    """Print a path without wrapping, so that it can be copied, and as a link."""
    link = f"bold link file://{path.resolve()}"
    console.print(Text.assemble(f"{name:9}", (str(path), link)), soft_wrap=True)


def example_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a prompt's answer, roles and evidence in the page's format."""
    roles: dict[str, list[tuple[int, int]]] = {}
    for role in row["roles"] or ():
        roles.setdefault(role["name"], []).append((role["start"], role["end"]))
    evidence = [tuple(span) for span in row["evidence"] or ()]
    named = [name for name, spans in roles.items() if set(spans) <= set(evidence)]
    return {
        "id": row["id"],
        "answer": None if row["correct"] is None else row["answer"],  # typed targets need not be right
        "roles": roles,
        "evidence": named or evidence,
        "evidence_first": row["evidence_first"],
        "correct": row["correct"],
    }


def _draw(
    folder: Path,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    attributions: Sequence[Attribution],
    mean: Attribution | None,
) -> None:
    """Draw the deletion and insertion curves, the mean scores and some prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    if curves := curves_of(summary):
        save_figure(curves_figure(curves), folder / "curves.svg")
    if mean is not None:
        title = f"Mean over {summary['prompts']:,} prompts"
        save_figure(attribution_figure(mean, title=title), folder / "mean.svg")
    for row, attribution in zip(rows, attributions, strict=False):
        save_figure(attribution_figure(attribution), folder / f"prompt-{row['index']}.svg")
