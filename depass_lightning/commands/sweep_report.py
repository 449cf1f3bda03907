"""`python analyze.py sweep_report=<folder>`: collect the runs of a sweep in one table and on one page."""

import dataclasses
import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from depass_lightning import sources
from depass_lightning.commands.console import existing_folder, reason_in_line
from depass_lightning.commands.outputs import example_of
from depass_lightning.errors import DePassError
from depass_lightning.reports.numbers import measure_name, percent, plain
from depass_lightning.reports.sweep import AXES, Map, varying, write_sweep_page
from depass_lightning.results.attribution import Attribution
from depass_lightning.storage import (
    UNREADABLE,
    RunStore,
    attribution_from_row,
    check_file,
    open_shard,
    write_shard,
)
from depass_lightning.utils.atomic_files import read_limited

SHOWN = 40  # prompts on the page, at most
MAPS = 1200  # attributions of these prompts in all runs, at most
HEADING = 8  # characters of a line of a heading, at least
BATCH_ROWS = 64  # rows in memory at a time
CONFIG_BYTES = 2**18
SUMMARY_BYTES = 2**26

TEXT, NUMBER, COUNT = pa.string(), pa.float64(), pa.int64()
COLUMNS = {
    "prompts": lambda value: f"{value:,}",
    "correct": percent,
    "evidence_first": percent,
    "patch_top_area": plain,
    "recover_top_area": plain,
    "completeness_max": plain,
    "seconds": plain,
}  # columns of the terminal table, with their number formats
SWEEP_SCHEMA = pa.schema(
    [
        *((name, TEXT) for name in ("run", "status", "reason", "model", "checkpoint", "dtype", "task")),
        *((name, TEXT) for name in ("source", "rule", "target", "method")),
        *((name, COUNT) for name in ("seed", "prompts", "skipped")),
        *((name, NUMBER) for name in ("correct", "completeness_max", "completeness_mean")),
        *((name, NUMBER) for name in ("evidence_first", "evidence_first_chance")),
        *((name, NUMBER) for name in ("patch_top_area", "patch_top_area_chance")),
        *((name, NUMBER) for name in ("recover_top_area", "recover_top_area_chance")),
        *((name, NUMBER) for name in ("seconds", "seconds_per_prompt")),
        *((name, COUNT) for name in ("parameters", "processes")),
        *((name, TEXT) for name in ("device", "fingerprint", "folder")),
    ]
)
"""The columns of `sweep.parquet`, which has one row per run.

`status` is done, unfinished or broken; `reason` explains the last two. The baseline of a number, such as
random order, has the number's name with the suffix `_chance`.
"""


def report_sweep(folder: str | Path, console: Console) -> int:
    """Collect the runs below a folder into `sweep.parquet` and `sweep.html`, and print them.

    Returns:
        The exit code: 1 if a run is unfinished or broken.

    Raises:
        DePassError: the folder does not exist, or contains no run.
    """
    folder = existing_folder(folder, "sweep_report")
    rows = [row for run in find_runs(folder) for row in _rows(run, folder)]
    maps = _maps(rows)
    done = [row for row in rows if row["status"] == "done"]
    table = write_shard(folder / "sweep.parquet", rows, SWEEP_SCHEMA)
    page = folder / "sweep.html"
    write_sweep_page(page, rows, maps, title=f"Sweep: {folder.name}")
    console.print(sweep_table(rows))
    for row in rows:
        if row["status"] != "done":
            console.print(Text(f"{row['status']:11}{row['run']}: {row['reason']}", "red"), soft_wrap=True)
    console.print(Text(f"page     {page}\ntable    {table}"), soft_wrap=True)
    return int(len(done) < len(rows))


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of all runs in a folder, including itself, sorted by name.

    Raises:
        DePassError: there are none.
    """
    parents = {path.parent for path in folder.rglob("config.yaml")}
    # A run that failed before it started has only Hydra's subfolder.
    runs = {parent.parent if parent.name == ".hydra" else parent for parent in parents}
    runs = {run for run in runs if not any(part.startswith(".") for part in run.relative_to(folder).parts)}
    if not runs:
        raise DePassError(
            f"{folder} holds no runs; give a sweep's folder, sweep_report=logs/analyze/multiruns/<time>"
        )
    return sorted(runs, key=lambda run: [(len(part), part) for part in run.relative_to(folder).parts])


def _rows(run: Path, folder: Path) -> list[dict[str, Any]]:
    """Return a run's rows, or one row with the reason why they cannot be read."""
    try:
        rows = read_runs(run, folder)
        pa.Table.from_pylist(rows, schema=SWEEP_SCHEMA)
    except Exception as error:
        row = _row(run, folder, {}) | _state("broken", f"its files cannot be read: {reason_in_line(error)}")
        return [{key: _plain(value) for key, value in row.items()}]
    return rows


def _plain(value: Any) -> Any:
    """Replace characters that cannot be encoded: a folder's name may be any bytes."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _maps(rows: list[dict[str, Any]]) -> list[Map]:
    """Read the attributions of finished runs; a run whose rows cannot be read is marked as broken."""
    while True:
        try:
            return read_maps([row for row in rows if row["status"] == "done"])
        except BrokenRunError as error:
            row = next(row for row in rows if row["run"] == error.run)
            row |= _state("broken", f"its results cannot be read: {error}")


class BrokenRunError(DePassError):
    """A run's rows cannot be read."""

    def __init__(self, run: str, error: Exception) -> None:
        super().__init__(reason_in_line(error))
        self.run = run


@contextmanager
def _reading(row: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise BrokenRunError(row["run"], error) from error


def read_config(path: Path) -> Any:
    """Read a configuration as plain containers.

    Raises:
        DePassError: the path is not a file, or the file is too large or has aliases, which no run writes and
            whose expansion is unbounded.
    """
    content = read_limited(path, CONFIG_BYTES)
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(content)):
        raise DePassError(f"{path} has aliases (*name); write out what they stand for")
    return OmegaConf.to_container(OmegaConf.create(content.decode()))


def read_runs(run: Path, folder: Path) -> list[dict[str, Any]]:
    """Read a run's folder: one row of `SWEEP_SCHEMA`, or one per model if the run compares models."""
    kept = run / "config.yaml"
    try:
        config = read_config(kept if kept.exists() else run / ".hydra/config.yaml")
    except Exception as error:  # from YAML, OmegaConf or the disk, or from deep nesting
        return [
            _row(run, folder, {})
            | _state("broken", f"its configuration cannot be read: {reason_in_line(error)}")
        ]
    if isinstance(config, dict) and config.get("compare"):
        names = sorted(path.parent for path in run.glob("*/summary.json"))
        return [_read(model, folder, config) for model in names] or [_read(run, folder, config)]
    if not isinstance(config, dict) or "task" not in config or "source" not in config:
        return [_row(run, folder, {}) | _state("broken", "it is not an analysis")]
    return [_read(run, folder, config)]


def _read(run: Path, folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    request = _row(run, folder, config)
    if not (run / "summary.json").exists():
        return request | _state(*_progress(run))
    try:
        check_file(run / "summary.json")
        summary = json.loads(read_limited(run / "summary.json", SUMMARY_BYTES))
        # The summary takes precedence: it has the name of each compared model.
        row = _row(run, folder, {**config, **summary}) | _numbers(summary)
        pq.read_schema(_rows_of(run))
        if damaged := RunStore(run).damaged():
            raise DePassError(
                f"{damaged[0]} is damaged or missing"
                + (f", and {len(damaged) - 1:,} more files" if len(damaged) > 1 else "")
                + "; the same command attributes its prompts again"
            )
    except (ValueError, TypeError, AttributeError, OSError, RecursionError) as error:  # pyarrow's, too
        return request | _state("broken", f"its results cannot be read: {reason_in_line(error)}")
    return row | _state("done", None)


def _row(run: Path, folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a run's settings, without results."""
    model, task = known.get("model") or {}, known.get("task") or {}
    name, revision = str(model.get("name", "")), model.get("revision")
    method = known.get("method")
    return {
        "run": run.relative_to(folder).as_posix(),
        "model": f"{name}@{revision}" if revision else name,
        "checkpoint": known.get("checkpoint"),
        "dtype": model.get("dtype"),
        "task": str(task.get("name", "")) + (f" {Path(task['path']).name}" if task.get("path") else ""),
        "source": labelled(known.get("source") or {}),
        "rule": (known.get("rule") or {}).get("name"),
        "target": (known.get("target") or {}).get("kind"),
        "method": str(method.get("name")) if isinstance(method, Mapping) else method,
        "seed": known.get("seed", (known.get("settings") or {}).get("seed")),
        "parameters": None,
        "fingerprint": model.get("fingerprint"),
        "folder": str(run.resolve()),
    }


def labelled(spec: Mapping[str, Any]) -> str:
    """Describe a `_target_` in one line: its class, and the arguments that differ from the defaults."""
    target = str(spec.get("_target_", ""))
    name = target.rpartition(".")[2].lower()
    # Compared as text: nothing that a results folder names is imported.
    known = {f"{sources.__name__}.{public}": getattr(sources, public) for public in sources.__all__}
    kind = known.get(target)
    declared = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    fields = {field.name: field.default for field in declared}
    settings = {key: value for key, value in spec.items() if not key.startswith("_")}
    changed = {
        key: value for key, value in settings.items() if value is not None and value != fields.get(key)
    }
    return " ".join([name, *(f"{key}={value}" for key, value in changed.items())])


def _numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary's numbers by the names of their columns."""
    numbers: dict[str, Any] = {"processes": (summary.get("hardware") or {}).get("processes")}
    numbers |= {
        "device": (summary.get("hardware") or {}).get("device"),
        "parameters": summary.get("model", {}).get("parameters"),
    }
    for name in SWEEP_SCHEMA.names:
        entry = summary.get(name)
        if isinstance(entry, Mapping) and "value" in entry:
            numbers |= {name: entry["value"], f"{name}_chance": entry.get("chance")}
        elif isinstance(entry, int | float):
            numbers[name] = entry
    prompts = numbers.get("prompts") or 0
    if prompts and "seconds" in numbers:
        numbers["seconds_per_prompt"] = numbers["seconds"] / prompts
    return numbers


def _state(status: str, reason: str | None) -> dict[str, Any]:
    return {"status": status, "reason": reason}


def _progress(run: Path) -> tuple[str, str]:
    """Return the status and reason of a run without a summary."""
    if not (run / "config.yaml").exists():
        return "broken", "it failed before it started; the log in its folder may have the reason"
    rows = 0
    for shard in run.glob("attributions/**/*.parquet"):
        try:
            rows += pq.read_metadata(shard).num_rows
        except UNREADABLE:
            continue
    return "unfinished", f"{rows:,} rows are done; it is still running, or the same command resumes it"


def _rows_of(run: Path) -> Path:
    return run / "attributions" / "attributions.parquet"


def read_maps(rows: Sequence[Mapping[str, Any]]) -> list[Map]:
    """Read the attributions of some prompts from every run, first those that most runs have.

    Raises:
        BrokenRunError: a run cannot be read.
    """
    held: Counter[tuple[str, str]] = Counter()
    for row in rows:
        with _reading(row):
            for batch in _batches(row, ["id"]):
                held.update((row["task"], prompt["id"]) for prompt in batch)
    # A stable sort: prompts of equally many runs keep their order.
    chosen = sorted(held, key=lambda key: -held[key])[:SHOWN]
    while len(chosen) > 1 and sum(held[key] for key in chosen) > MAPS:
        chosen.pop()
    ids = Counter(id for _, id in chosen)
    names = {(task, id): id if ids[id] == 1 else f"{task} {id}" for task, id in chosen}
    maps: list[Map] = []
    for row in rows:
        wanted = {id for task, id in chosen if task == row["task"]}
        with _reading(row):
            for batch in _batches(row, None) if wanted else ():
                for prompt in batch:
                    if prompt["id"] in wanted:
                        attribution: Attribution = attribution_from_row(prompt)
                        name = names[row["task"], prompt["id"]]
                        maps.append(Map(row["run"], name, attribution, example_of(prompt)))
    order = {name: place for place, name in enumerate(names.values())}
    return sorted(maps, key=lambda map: order[map.prompt])


def _batches(row: Mapping[str, Any], columns: list[str] | None) -> Any:
    """Read a run's rows in batches."""
    with open_shard(_rows_of(Path(row["folder"]))) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            yield batch.to_pylist()


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with one line per run: the settings in which the runs differ, and the results."""
    axes = ["model", "task", *(name for name in varying(rows) if name not in ("model", "task"))]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ["run", *axes]:
        table.add_column(AXES.get(name, name), overflow="fold")
    columns: list[list[str]] = []
    for name, write in COLUMNS.items():
        if any(row.get(name) is not None for row in rows):
            label = measure_name(name)
            cells = ["" if row.get(name) is None else write(row[name]) for row in rows]
            # In a narrow terminal names wrap, and headings do in any; numbers are never cut.
            heading = textwrap.fill(label, max(HEADING, *map(len, [*cells, *label.split()])))
            table.add_column(heading, justify="right", no_wrap=True)
            columns.append(cells)
    for place, row in enumerate(rows):
        settings = (Text("" if row.get(name) is None else str(row[name])) for name in axes)
        results = (cells[place] for cells in columns)
        table.add_row(Text(row["run"]), *settings, *results, style="" if row["status"] == "done" else "dim")
    return table
