"""Sinks: where scalars and maps are logged, besides the files.

- Weights & Biases: one row of the run's history for all sets, with the scalars, each page as an Html panel
  under one key, so that its step slider plays the training, and a fresh Table of the probes; and the scores
  as a new version of one Artifact a set.
- TensorBoard: a figure of each of the first probes, and the table as text.
- MLflow: the page, the scores' file and the table as artifacts; it previews pages and tables.
- Any function of the scalars and the step, such as `fabric.log_dict` or `accelerator.log`.
"""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from depass_lightning.errors import DePassError
from depass_lightning.monitoring.maps import MapFiles, place_of, table
from depass_lightning.reports.numbers import visible

NAME_LENGTH = 64  # characters of a probe set's name in a W&B name, which may have 128 in all
FIGURES = 4  # TensorBoard keeps all figures of all steps in one file
LogFunction = Callable[[dict[str, Any], int], Any]


class Sink(Protocol):
    """What a run is logged to."""

    service: str  # named where it fails

    def log(self, scalars: Mapping[str, float], maps: Sequence[MapFiles], step: int) -> None:
        """Log one run, on the first rank.

        Args:
            scalars: the run's scalars by their full names; empty if they are logged elsewhere.
            maps: the files of each probe set and source.
            step: the step.
        """


class FunctionSink:
    """Passes the scalars to a function.

    Args:
        function: takes the scalars and the step.
        service: what it logs to, for error messages.
    """

    def __init__(self, function: LogFunction, service: str = "the function") -> None:
        self._function = function
        self.service = service

    def log(self, scalars: Mapping[str, float], maps: Sequence[MapFiles], step: int) -> None:  # noqa: ARG002
        """Log the scalars."""
        if scalars:
            self._function(dict(scalars), step)


class WandbSink:
    """Logs to a run of Weights & Biases, one row for all probe sets.

    Args:
        run: the run; None for the current one.
        axis: the key under which the training logs its step, such as "train/global_step"; the probes' curves
            are drawn over it. None if the training logs with `wandb.log(..., step=step)`.
        function: logs a row under a step, instead of the run.
    """

    service = "Weights & Biases"

    def __init__(self, run: Any = None, axis: str | None = None, function: LogFunction | None = None) -> None:
        import wandb  # slow to import

        self._run: Any = run or wandb.run
        if self._run is None:
            raise DePassError("there is no run of Weights & Biases; call wandb.init() first, or give run=")
        self._axis = axis
        self._function = function
        if axis is not None:
            self._run.define_metric("depass/*", step_metric=axis)

    def log(self, scalars: Mapping[str, float], maps: Sequence[MapFiles], step: int) -> None:
        """Log the scalars, the pages and the tables in one row, and the scores as artifacts."""
        import wandb

        row: dict[str, Any] = dict(scalars)
        for files in maps:
            name = f"depass/{wandb_name(files.result.name)}"
            pages = {"map": files.page} | ({"circuit": files.circuit[0]} if files.circuit else {})
            for key, path in pages.items():
                page = path.read_text(encoding="utf-8")
                row[f"{name}/{key}"] = wandb.Html(page, inject=False, data_is_not_path=True)
            columns, rows = table(files.result)
            # a Table that was logged cannot be changed, so each step has its own
            row[f"{name}/table"] = wandb.Table(columns=columns, data=rows)
        if self._function is not None:
            self._function(row, step)
        elif self._axis is not None:
            self._run.log({**row, self._axis: step})
        else:
            self._run.log(row, step=step)
        for files in maps:
            self._run.log_artifact(self._artifact(files), aliases=["latest", f"step-{files.result.step}"])

    def _artifact(self, files: MapFiles) -> Any:
        import wandb

        # artifact names are shared by all runs of a project
        name = f"attributions-{wandb_name(files.result.name).replace('/', '-')}-{self._run.id}"
        metadata = {"step": files.result.step, **files.result.metrics}
        artifact = wandb.Artifact(name, type="attributions", metadata=metadata)
        artifact.add_file(str(files.scores), name="attributions.parquet")
        if files.circuit:
            artifact.add_file(str(files.circuit[1]), name="circuit.safetensors")
        return artifact


class TensorBoardSink:
    """Logs to a `SummaryWriter` of TensorBoard.

    Args:
        writer: the writer.
        function: logs scalars under a step, instead of the writer.
    """

    service = "TensorBoard"

    def __init__(self, writer: Any, function: LogFunction | None = None) -> None:
        self._writer = writer
        self._scalars = FunctionSink(function or self._add_scalars)

    def log(self, scalars: Mapping[str, float], maps: Sequence[MapFiles], step: int) -> None:
        """Log the scalars, figures of the first probes, and the tables as text."""
        self._scalars.log(scalars, maps, step)
        for files in maps:
            self._log_map(files, step)

    def _add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, global_step=step)

    def _log_map(self, files: MapFiles, step: int) -> None:
        from depass_lightning.reports.figures import tokens_figure  # imports matplotlib: slow

        result = files.result
        for probe, attribution in list(zip(result.probes, result.attributions, strict=True))[:FIGURES]:
            tag = f"depass/{result.name}/map/{probe.id}"
            self._writer.add_figure(tag, tokens_figure(attribution), global_step=step)
        if result.circuit is not None:
            from depass_lightning.reports.circuit_page import circuit_figure

            figure = circuit_figure(result.circuit)
            self._writer.add_figure(f"depass/{result.name}/circuit", figure, global_step=step)
        columns, rows = table(result)
        lines: list[list[Any]] = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
        self._writer.add_text(f"depass/{result.name}/table", text, global_step=step)


class MLflowSink:
    """Logs to a run of MLflow.

    Args:
        client: an `MlflowClient`.
        run_id: the run's id.
        function: logs scalars under a step, instead of the client.
    """

    service = "MLflow"

    def __init__(self, client: Any, run_id: str, function: LogFunction | None = None) -> None:
        self._client = client
        self._run_id = run_id
        self._scalars = FunctionSink(function or self._log_scalars)

    def log(self, scalars: Mapping[str, float], maps: Sequence[MapFiles], step: int) -> None:
        """Log the scalars, and pages, scores and tables as artifacts."""
        self._scalars.log(scalars, maps, step)
        for files in maps:
            place = place_of(files.result).as_posix()
            for file in (files.page, files.scores, *(files.circuit or ())):
                self._client.log_artifact(self._run_id, str(file), artifact_path=place)
            columns, rows = table(files.result)
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([columns, *rows])
            self._client.log_text(self._run_id, text.getvalue(), f"{place}/{files.page.stem}.csv")

    def _log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._client.log_metric(self._run_id, name, value, step=step)


def sinks_of(loggers: Sequence[Any]) -> list[Sink]:
    """Return the sinks of the loggers of `lightning` or `pytorch_lightning`.

    Args:
        loggers: the trainer's.
    """
    sinks: list[Sink] = []
    for logger in loggers:
        if is_named(logger, "WandbLogger"):
            sinks.append(WandbSink(logger.experiment, function=logger.log_metrics))
        elif is_named(logger, "TensorBoardLogger"):
            sinks.append(TensorBoardSink(logger.experiment, logger.log_metrics))
        elif is_named(logger, "MLFlowLogger"):
            sinks.append(MLflowSink(logger.experiment, logger.run_id, logger.log_metrics))
        else:
            sinks.append(FunctionSink(logger.log_metrics, type(logger).__name__))
    return sinks


def is_named(thing: object, *names: str) -> bool:
    """Whether an object's class, or one that it inherits from, has one of these names.

    The classes of `lightning` and `pytorch_lightning` share nothing but their names.

    Args:
        thing: the object.
        names: the names of classes.
    """
    return any(kind.__name__ in names for kind in type(thing).__mro__)


def wandb_name(name: str) -> str:
    """Return a probe set's name as Weights & Biases allows it in the names of files and artifacts.

    ASCII letters, digits and `_.-`, with slashes between parts; a name that has to be changed or shortened
    ends with a digest of the original, so that names stay different.

    Args:
        name: the name of a probe set, or of a set and a source.
    """
    parts = [re.sub(r"[^\w.-]", "-", part, flags=re.ASCII) for part in name.split("/")]
    fit = "/".join(part for part in parts if part.strip("."))[:NAME_LENGTH].rstrip("/")
    if fit == name:
        return name
    return f"{fit}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _cell(value: Any) -> str:
    """Return a value as a cell of a Markdown table, with character references for Markdown's marks."""
    text = f"{value:.4g}" if isinstance(value, float) else visible(str(value))
    return re.sub(r"[\\`*_\[\]<>&|!~^$]", lambda mark: f"&#{ord(mark[0])};", text)
