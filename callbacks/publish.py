"""Where the callback's results go: files beside the run's logs, and each logger in its own way.

Files are always written. What a logger gets beside the scalars:

- Weights & Biases: the page as an Html panel under one key, so that its step slider plays the training, and a
  fresh Table of the probes, both in the same row of the run's history as the scalars; and the scores as a new
  version of one Artifact.
- TensorBoard: a figure of each of the first probes, and the table as text.
- MLflow: the page, the scores' file and the table as artifacts; it previews pages and tables.
"""

import csv
import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from depass_lightning.callbacks.results import Result
from depass_lightning.reports.page import write_page
from depass_lightning.storage import ATTRIBUTION_SCHEMA, attribution_to_row, write_json, write_shard

FIGURES = 4  # TensorBoard keeps every figure of every step in its one file
CARDS = {
    "rank": "rank of the answer",
    "similarity_first": "similarity to the first run",
    "similarity_previous": "similarity to the previous run",
    "spearman_first": "rank correlation with the first run",
    "spearman_previous": "rank correlation with the previous run",
    "faithfulness": "faithfulness, random removal less removal of the top",
    "failed": "failed probes",
}
COLUMNS = ("probe", "prompt", "target", "prediction", "top tokens", "gained most", "lost most")
SHOWN = 3  # tokens in a cell of the table


def publish(result: Result, loggers: Sequence[Logger], folder: Path, step: int) -> None:
    """Write a result's files below `folder`, then hand its maps to every logger that can hold them.

    Args:
        result: what a run found.
        loggers: the trainer's.
        folder: the run's folder.
        step: what the loggers call this step.
    """
    folder = folder / "depass" / result.name
    write_json(folder / "history.json", result.history.as_json())
    if not result.attributions:
        return
    page, scores = write_maps(result, folder)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _to_wandb(logger, result, page, scores, step)
        elif isinstance(logger, TensorBoardLogger):
            _to_tensorboard(logger, result, step)
        elif isinstance(logger, MLFlowLogger):
            _to_mlflow(logger, result, (page, scores))


def write_maps(result: Result, folder: Path) -> tuple[Path, Path]:
    """Write the page (`step-000123.html`) and the scores (`step-000123.parquet`) of one step.

    The scores have the columns of an analysis, so that `read_attributions` reads them.
    """
    page = folder / f"step-{result.step:06d}.html"
    known = [{"id": probe.id, "evidence": probe.evidence} for probe in result.probes]
    write_page(
        page,
        result.attributions,
        title=f"{result.name}, step {result.step}",
        subtitle=_moved(result),
        summary={CARDS.get(name, name): value for name, value in result.metrics.items()},
        examples=known,
    )
    rows = [
        attribution_to_row(attribution)
        | probe
        | {"index": i, "correct": attribution.correct}
        | (dataclasses.asdict(curves) if curves else {})
        for i, (probe, attribution, curves) in enumerate(
            zip(known, result.attributions, result.curves, strict=True)
        )
    ]
    return page, write_shard(page.with_suffix(".parquet"), rows, ATTRIBUTION_SCHEMA)


def table(result: Result) -> tuple[list[int | str], list[Any]]:
    """Return one row a probe: what was asked, what the model says, which tokens count, and the scalars."""
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
    """Say which component of all probes gained most since the first run, and which lost most."""
    found = []
    for word, pick in (("gained", max), ("lost", min)):
        changes = [
            (after - before, name.strip(), before, after, probe.id)
            for probe, drift in zip(result.probes, result.drifts, strict=True)
            if "first" in drift
            for name, before, after in getattr(drift["first"], word)[:1]
        ]
        if changes:
            _, name, before, after, probe = pick(changes)
            found.append(f"{name} in {probe} has {word} most ({before:+.2f} → {after:+.2f})")
    return f"Since step {result.history.steps[0]}: {'; '.join(found)}." if found else ""


def _to_wandb(logger: WandbLogger, result: Result, page: Path, scores: Path, step: int) -> None:
    import wandb  # takes a second, which only those who use it should wait

    columns, rows = table(result)
    maps = {
        "map": wandb.Html(page.read_text(encoding="utf-8"), inject=False, data_is_not_path=True),
        # a Table that was logged cannot be changed, so each step has its own
        "table": wandb.Table(columns=columns, data=rows),
    }
    logger.log_metrics({f"depass/{result.name}/{key}": shown for key, shown in maps.items()}, step=step)
    run = logger.experiment
    # its name is the project's, so that it has to say which run it is of
    name = re.sub(r"[^\w.-]", "-", f"attributions-{result.name}-{run.id}")
    metadata = {"step": result.step, **result.metrics}
    artifact = wandb.Artifact(name, type="attributions", metadata=metadata)
    artifact.add_file(str(scores), name="attributions.parquet")
    run.log_artifact(artifact, aliases=["latest", f"step-{result.step}"])


def _to_tensorboard(logger: TensorBoardLogger, result: Result, step: int) -> None:
    from depass_lightning.reports.figures import tokens_figure  # draws in matplotlib: as slow

    for probe, attribution in list(zip(result.probes, result.attributions, strict=True))[:FIGURES]:
        tag = f"depass/{result.name}/map/{probe.id}"
        logger.experiment.add_figure(tag, tokens_figure(attribution), global_step=step)
    columns, rows = table(result)
    lines: list[list[Any]] = [columns, ["---"] * len(columns), *rows]
    text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    logger.experiment.add_text(f"depass/{result.name}/table", text, global_step=step)


def _to_mlflow(logger: MLFlowLogger, result: Result, files: Sequence[Path]) -> None:
    place = f"depass/{result.name}"
    for file in files:
        logger.experiment.log_artifact(logger.run_id, str(file), artifact_path=place)
    columns, rows = table(result)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    logger.experiment.log_text(logger.run_id, text.getvalue(), f"{place}/{files[0].stem}.csv")


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
