"""The maps of a run, one for each probe set and source: a page, a file of scores and a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depass_lightning.monitoring.results import Result
from depass_lightning.reports.circuit_page import write_circuit_page
from depass_lightning.reports.page import page_html
from depass_lightning.storage import ATTRIBUTION_SCHEMA, attribution_to_row, write_json, write_shard
from depass_lightning.utils.atomic_files import safe_path, write_whole

CARDS = {
    "rank": "rank of the answer",
    "similarity_first": "similarity to the first run",
    "similarity_previous": "similarity to the previous run",
    "spearman_first": "rank correlation with the first run",
    "spearman_previous": "rank correlation with the previous run",
    "faithfulness": "faithfulness, random removal minus removal of the top",
    "kept_faithfulness": "faithfulness with the last token kept",
    "circuit_overlap_first": "circuit edges shared with the first run",
    "circuit_overlap_previous": "circuit edges shared with the previous run",
    "failed": "failed probes",
}
COLUMNS = ("probe", "prompt", "target", "prediction", "top tokens", "gained most", "lost most")
SHOWN = 3  # tokens in a cell of the table


@dataclass(frozen=True)
class MapFiles:
    """The files of one result.

    Attributes:
        result: the result.
        page: its page, `step-000123.html`.
        scores: its scores, `step-000123.parquet`.
        circuit: the page of its circuit and the circuit itself, if it was computed.
    """

    result: Result
    page: Path
    scores: Path
    circuit: tuple[Path, Path] | None = None


def place_of(result: Result) -> Path:
    """Return the path of a result's files in the run's folder, for any name of set and source.

    Args:
        result: the result of a run.
    """
    return Path("depass", safe_path(result.name))


def write_maps(result: Result, folder: Path) -> MapFiles | None:
    """Write a result's history, circuit, page and scores; without attributions the history alone.

    The scores have the columns of an analysis, so that `read_attributions` reads them.

    Args:
        result: the result of a run.
        folder: the run's folder.

    Returns:
        The page and the scores; None without attributions.
    """
    folder = folder / place_of(result)
    write_json(folder / "history.json", result.history.as_json())
    circuit = None
    if result.circuit is not None:
        circuit = folder / "circuit.html", folder / f"circuit-{result.step:06d}.safetensors"
        result.circuit.save(circuit[1])
        title = f"{result.name}, step {result.step}: the circuit"
        timeline = result.history.circuits
        write_circuit_page(circuit[0], result.circuit, title=title, timeline=timeline)
    if not result.attributions:
        return None
    path = folder / f"step-{result.step:06d}.html"
    write_whole(path, page(result).encode("utf-8", errors="replace"))
    rows = [
        attribution_to_row(attribution) | probe | {"index": i} | curves
        for i, (probe, attribution, curves) in enumerate(
            zip(_examples(result), result.attributions, result.curves, strict=True)
        )
    ]
    scores = write_shard(path.with_suffix(".parquet"), rows, ATTRIBUTION_SCHEMA)
    return MapFiles(result, path, scores, circuit)


def page(result: Result) -> str:
    """Return the HTML page of a result that has attributions.

    Args:
        result: the result of a run.
    """
    ends = result.intervals
    return page_html(
        result.attributions,
        title=f"{result.name}, step {result.step}",
        subtitle=_moved(result),
        summary={
            CARDS.get(name, name): {"value": value, "low": ends[name][0], "high": ends[name][1]}
            if name in ends
            else value
            for name, value in result.metrics.items()
        },
        examples=_examples(result),
    )


def table(result: Result) -> tuple[list[int | str], list[Any]]:
    """Return the column names, and one row per probe: prompt, prediction, top tokens, and scalars.

    Args:
        result: the result of a run.
    """
    names = [name for name in result.metrics if any(name in row for row in result.rows)]
    rows = []
    for probe, attribution, drift, row in zip(
        result.probes, result.attributions, result.drifts, result.rows, strict=True
    ):
        first = drift.get("first")
        text = probe.prompt or "".join(attribution.tokens)
        top = ", ".join(f"{name.strip()} {score:+.2f}" for name, score in attribution.top(SHOWN))
        moved = (_changes(first.gained), _changes(first.lost)) if first else ("", "")
        cells = (probe.id, text, attribution.target, attribution.prediction, top, *moved)
        rows.append([*cells, *(row.get(name) for name in names)])
    return [*COLUMNS, *names], rows


def _changes(changes: Sequence[tuple[str, float, float]]) -> str:
    return ", ".join(
        f"{name.strip()} {before:+.2f} → {after:+.2f}" for name, before, after in changes[:SHOWN]
    )


def _moved(result: Result) -> str:
    """Describe which component of all probes gained most since the first run, and which lost most."""
    moves = []
    for word, pick in (("gained", max), ("lost", min)):
        changes = [
            (after - before, name.strip(), before, after, probe.id)
            for probe, drift in zip(result.probes, result.drifts, strict=True)
            if "first" in drift
            for name, before, after in getattr(drift["first"], word)[:1]
        ]
        if changes:
            _, name, before, after, probe = pick(changes)
            moves.append(f"{name} in {probe} has {word} most ({before:+.2f} → {after:+.2f})")
    return f"Since step {result.history.steps[0]}: {'; '.join(moves)}." if moves else ""


def _examples(result: Result) -> list[dict[str, Any]]:
    """Return what is known of each probe: its id, its evidence, and whether the model was right."""
    return [
        {
            "id": probe.id,
            "evidence": probe.evidence,
            "correct": attribution.correct if probe.judged else None,
        }
        for probe, attribution in zip(result.probes, result.attributions, strict=True)
    ]
