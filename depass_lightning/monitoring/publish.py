"""Publishes the callback's results: files in the run's folder, and what each kind of logger can show.

Files are always written. Besides the scalars, loggers get:

- Weights & Biases: the page as an Html panel under one key, so that its step slider plays the training, and a
  fresh Table of the probes, both in the same row of the run's history as the scalars; and the scores as a new
  version of one Artifact.
- TensorBoard: a figure of each of the first probes, and the table as text.
- MLflow: the page, the scores' file and the table as artifacts; it previews pages and tables.
"""

import csv
import hashlib
import io
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from depass_lightning.monitoring.results import Result
from depass_lightning.reports.numbers import visible
from depass_lightning.reports.page import write_page
from depass_lightning.storage import ATTRIBUTION_SCHEMA, attribution_to_row, write_json, write_shard
from depass_lightning.utils.atomic_files import safe_path

log = logging.getLogger(__name__)

NAME_LENGTH = 64  # characters of a probe set's name in a W&B name, which may have 128 in all
FIGURES = 4  # TensorBoard keeps all figures of all steps in one file
CARDS = {
    "rank": "rank of the answer",
    "similarity_first": "similarity to the first run",
    "similarity_previous": "similarity to the previous run",
    "spearman_first": "rank correlation with the first run",
    "spearman_previous": "rank correlation with the previous run",
    "faithfulness": "faithfulness, random removal minus removal of the top",
    "failed": "failed probes",
}
COLUMNS = ("probe", "prompt", "target", "prediction", "top tokens", "gained most", "lost most")
SHOWN = 3  # tokens in a cell of the table


def publish(result: Result, loggers: Sequence[Logger], folder: Path, step: int, strict: bool = False) -> None:
    """Write a result's files to `folder`, then pass its maps to every logger that can show them.

    A failure is logged, and the rest is done.

    Args:
        result: the result of a run.
        loggers: the trainer's.
        folder: the run's folder.
        step: the loggers' step.
        strict: raise the first error instead.
    """
    folder, maps = folder / _place(result), f"the maps of {result.name!r} at step {result.step}"
    files = None
    with _naming(f"{maps} were not written", strict):
        write_json(folder / "history.json", result.history.as_json())
        files = write_maps(result, folder) if result.attributions else None
    if files is None:
        return
    publishers = {
        "WandbLogger": ("Weights & Biases", _to_wandb),
        "TensorBoardLogger": ("TensorBoard", _to_tensorboard),
        "MLFlowLogger": ("MLflow", _to_mlflow),
    }
    for logger in loggers:
        for kind, (service, send) in publishers.items():
            if is_named(logger, kind):
                with _naming(f"{maps} are in {folder}, but {service} did not accept them", strict):
                    send(logger, result, files, step)


def _place(result: Result) -> Path:
    """Return the path of a result's files in the run's folder, for any name of set and source."""
    return Path("depass", safe_path(result.name))


@contextmanager
def _naming(failure: str, strict: bool) -> Iterator[None]:
    """Log what failed and why, or raise the error where `strict`."""
    try:
        yield
    except Exception as error:
        if strict:
            raise
        log.warning("%s: %s", failure, error)
        log.debug(failure, exc_info=True)


def is_named(thing: object, *names: str) -> bool:
    """Whether an object's class, or one that it inherits from, has one of these names.

    The classes of `lightning` and `pytorch_lightning` share nothing but their names.

    Args:
        thing: the object.
        names: names of classes.
    """
    return any(kind.__name__ in names for kind in type(thing).__mro__)


def write_maps(result: Result, folder: Path) -> tuple[Path, Path]:
    """Write the page (`step-000123.html`) and the scores (`step-000123.parquet`) of one step.

    The scores have the columns of an analysis, so that `read_attributions` reads them.

    Args:
        result: the result of a run.
        folder: where to write.
    """
    page = folder / f"step-{result.step:06d}.html"
    known = [
        {
            "id": probe.id,
            "evidence": probe.evidence,
            "correct": attribution.correct if probe.judged else None,
        }
        for probe, attribution in zip(result.probes, result.attributions, strict=True)
    ]
    write_page(
        page,
        result.attributions,
        title=f"{result.name}, step {result.step}",
        subtitle=_moved(result),
        summary={CARDS.get(name, name): value for name, value in result.metrics.items()},
        examples=known,
    )
    rows = [
        attribution_to_row(attribution) | probe | {"index": i} | curves
        for i, (probe, attribution, curves) in enumerate(
            zip(known, result.attributions, result.curves, strict=True)
        )
    ]
    return page, write_shard(page.with_suffix(".parquet"), rows, ATTRIBUTION_SCHEMA)


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


def _wandb_name(name: str) -> str:
    """Return a probe set's name as Weights & Biases allows it in the names of files and artifacts.

    ASCII letters, digits and `_.-`, with slashes between parts; a name that has to be changed or shortened
    ends with a digest of the original, so that names stay different.
    """
    parts = [re.sub(r"[^\w.-]", "-", part, flags=re.ASCII) for part in name.split("/")]
    fit = "/".join(part for part in parts if part.strip("."))[:NAME_LENGTH].rstrip("/")
    if fit == name:
        return name
    return f"{fit}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _to_wandb(logger: Any, result: Result, files: tuple[Path, Path], step: int) -> None:
    import wandb  # slow to import

    page, scores = files
    columns, rows = table(result)
    maps = {
        "map": wandb.Html(page.read_text(encoding="utf-8"), inject=False, data_is_not_path=True),
        # a Table that was logged cannot be changed, so each step has its own
        "table": wandb.Table(columns=columns, data=rows),
    }
    set_name = _wandb_name(result.name)
    logger.log_metrics({f"depass/{set_name}/{key}": shown for key, shown in maps.items()}, step=step)
    run = logger.experiment
    # artifact names are shared by all runs of a project
    name = f"attributions-{set_name.replace('/', '-')}-{run.id}"
    metadata = {"step": result.step, **result.metrics}
    artifact = wandb.Artifact(name, type="attributions", metadata=metadata)
    artifact.add_file(str(scores), name="attributions.parquet")
    run.log_artifact(artifact, aliases=["latest", f"step-{result.step}"])


def _to_tensorboard(logger: Any, result: Result, _files: tuple[Path, Path], step: int) -> None:
    from depass_lightning.reports.figures import tokens_figure  # imports matplotlib: slow

    for probe, attribution in list(zip(result.probes, result.attributions, strict=True))[:FIGURES]:
        tag = f"depass/{result.name}/map/{probe.id}"
        logger.experiment.add_figure(tag, tokens_figure(attribution), global_step=step)
    columns, rows = table(result)
    lines: list[list[Any]] = [columns, ["---"] * len(columns), *rows]
    text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    logger.experiment.add_text(f"depass/{result.name}/table", text, global_step=step)


def _to_mlflow(logger: Any, result: Result, files: tuple[Path, Path], _step: int) -> None:
    place = _place(result).as_posix()
    for file in files:
        logger.experiment.log_artifact(logger.run_id, str(file), artifact_path=place)
    columns, rows = table(result)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    logger.experiment.log_text(logger.run_id, text.getvalue(), f"{place}/{files[0].stem}.csv")


def _cell(value: Any) -> str:
    """Return a value as a cell of a Markdown table, with character references for Markdown's marks."""
    text = f"{value:.4g}" if isinstance(value, float) else visible(str(value))
    return re.sub(r"[\\`*_\[\]<>&|!~^$]", lambda mark: f"&#{ord(mark[0])};", text)
