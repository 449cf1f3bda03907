"""`python analyze.py compare=[...]`: the same prompts through several models, or several finished runs."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from depass_lightning.commands.outputs import example_of, number_of
from depass_lightning.commands.sweep_report import read_runs
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.models.checkpoint import is_checkpoint, load_checkpoint
from depass_lightning.models.folder import fault_of_file
from depass_lightning.reports.compare_page import compared, write_compare_page
from depass_lightning.reports.numbers import amount, measure_name
from depass_lightning.reports.sweep import AXES, varying
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.comparison import Comparison
from depass_lightning.storage import RowFile, attribution_from_row, write_json
from depass_lightning.utils.atomic_files import safe_name

ADAPTER = "adapter_config.json"
ROWS = Path("attributions", "attributions.parquet")
SHOWN = ("correct", "evidence_first", "patch_top_area", "recover_top_area", "cosine", "spearman")
Rows = dict[str, dict[str, Any]]


def compare(
    config: DictConfig,
    folder: Path,
    load: Callable[[DictConfig], DePass],
    run: Callable[..., Any],
    console: Console,
) -> int:
    """Compare finished runs, or attribute a task with each of several models, and write what changed.

    Raises:
        DePassError: fewer than two entries, two equal ones, one that cannot be loaded or read, or no prompt
            whose scores can be compared.
    """
    entries = [str(entry) for entry in config.compare]
    if len(entries) < 2 or len(set(entries)) < len(entries):
        raise DePassError(f"compare={entries}: give two different models or more, as compare=[first,second]")
    finished = [is_run(entry) for entry in entries]
    if any(finished) and not all(finished):
        raise DePassError(f"compare={entries}: give models alone, or folders of finished runs alone")
    if all(finished):
        labels, summaries, kept = read_finished(entries)
    else:
        labels, summaries, kept = _attribute_models(config, folder, load, run, entries)
    prompts, comparisons = _compared_prompts(kept)
    rows = [
        {"model": label, "from": entry} | _numbers(summary) | _aggregates(place, prompts, comparisons)
        for place, (label, entry, summary) in enumerate(zip(labels, entries, summaries, strict=True))
    ]
    write_json(folder / "compare.json", {"models": rows})
    page = folder / "compare.html"
    most = sorted(prompts, key=lambda id: min(c.cosine for c in comparisons[id]))[: config.report.prompts]
    cut = len(most) < len(prompts)
    write_compare_page(
        page,
        {id: prompts[id] for id in most},
        labels,
        title=f"What changed from {labels[0]} to {labels[-1]}",
        subtitle=f"the {len(most):,} of {len(prompts):,} prompts that changed most" if cut else "",
        examples={id: example_of(row) for id, row in kept[-1].items() if id in most},
        table=[{name: row.get(name) for name in ("mean_value", *SHOWN)} for row in rows],
    )
    console.print(_table(rows))
    console.print(Text(f"\npage     {page}\nfolder   {folder}"), soft_wrap=True)
    return 0


def is_run(entry: str) -> bool:
    """Return whether an entry of `compare=` is the folder of a run of `analyze.py`.

    Args:
        entry: the entry.
    """
    return (Path(entry).expanduser() / ROWS.parent).is_dir()


def read_finished(entries: Sequence[str]) -> tuple[list[str], Sequence[Mapping[str, Any]], list[Rows]]:
    """Read finished runs.

    Args:
        entries: the runs' folders.

    Returns:
        A label for each run, which names the settings that differ; its numbers; and its rows by their ids.

    Raises:
        DePassError: a run is not finished, or its files cannot be read.
    """
    folders = [Path(entry).expanduser() for entry in entries]
    runs = [read_runs(folder, folder.parent)[0] for folder in folders]
    for entry, run in zip(entries, runs, strict=True):
        if run["status"] != "done":
            raise DePassError(f"{entry} cannot be compared, it is {run['status']}: {run['reason']}")
    axes = [axis for axis in varying(runs) if axis in AXES]
    labels = [" · ".join(str(run[axis]) for axis in axes if run[axis] is not None) for run in runs]
    if len(set(labels)) < len(labels) or not all(labels):
        labels = labelled(entries)
    return labels, runs, [{row["id"]: row for row in RowFile(folder / ROWS)} for folder in folders]


def _attribute_models(
    config: DictConfig,
    folder: Path,
    load: Callable[[DictConfig], DePass],
    run: Callable[..., Any],
    entries: Sequence[str],
) -> tuple[list[str], Sequence[Mapping[str, Any]], list[Rows]]:
    """Attribute the task with each model; return what `read_finished` returns."""
    if config.trainer.get("devices", 1) not in (1, "auto"):
        raise DePassError(
            "compare= runs on one process; leave trainer.devices out, or sweep with -m model=..."
        )
    labels, summaries, kept = labelled(entries), [], []
    for entry, label in zip(entries, labels, strict=True):
        load_model = partial(load_entry, entry, config, load)
        results = run(_model_config(config, label), folder / label, load_model).results
        summaries.append(results.summary)
        kept.append({row["id"]: row for row in results.rows})
    return labels, summaries, kept


def _compared_prompts(
    kept: Sequence[Rows],
) -> tuple[dict[str, list[Attribution]], dict[str, list[Comparison]]]:
    """Return the attributions of the prompts that all runs have, and their comparisons with the first run's.

    Runs of one prompt each are compared even if its name differs.
    """
    prompts, comparisons, refused = {}, {}, None
    for id, rows in _in_all(kept):
        first, *others = attributions = [attribution_from_row(row) for row in rows]
        try:
            comparisons[id] = [compared(first, other) for other in others]
            prompts[id] = attributions
        except DePassError as error:
            refused = refused or error
    if not prompts:
        raise refused or DePassError("the runs have no prompt in common; nothing to compare")
    return prompts, comparisons


def _in_all(kept: Sequence[Rows]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    if all(len(rows) == 1 for rows in kept):
        yield next(iter(kept[-1])), [next(iter(rows.values())) for rows in kept]
        return
    for id in kept[0]:
        if all(id in rows for rows in kept):
            yield id, [rows[id] for rows in kept]


def _aggregates(
    place: int, prompts: Mapping[str, Sequence[Attribution]], comparisons: Mapping[str, Sequence[Comparison]]
) -> dict[str, float]:
    """Return one run's means over the compared prompts, and those of its comparisons with the first run."""
    count = len(prompts)
    with_first = [of_prompt[place - 1] for of_prompt in comparisons.values()] if place else []
    return {
        "prompts_in_both": count,
        "mean_value": sum(attributions[place].value for attributions in prompts.values()) / count,
        "cosine": sum(one.cosine for one in with_first) / count if place else 1.0,
        "spearman": sum(one.spearman for one in with_first) / count if place else 1.0,
    }


def load_entry(entry: str, config: DictConfig, load: Callable[[DictConfig], DePass]) -> DePass:
    """Load one of the compared models.

    Args:
        entry: a folder or hub name, `name@revision`, the folder of a `peft` adapter of the configured model,
            or a training checkpoint of it that `models.checkpoint.load_checkpoint` reads.
        config: the configuration; its model is the one that adapters and checkpoints belong to.
        load: loads the model that a configuration names.

    Raises:
        DePassError: the model cannot be loaded, or a checkpoint does not fit it.
    """
    path = Path(entry).expanduser()
    if is_checkpoint(entry):
        depass = load(config)
        load_checkpoint(depass.model, entry)
        return depass
    if (path / ADAPTER).is_file():
        depass = load(config)
        return DePass(_adapted(depass.model, path), depass.tokenizer, compute_dtype=config.compute_dtype)
    name, _, revision = (entry, "", "") if path.exists() else entry.partition("@")
    model_config = config.copy()
    with open_dict(model_config):
        model_config.model = {**config.model, "name": name, "revision": revision or None, "gated": False}
    return load(model_config)


def _adapted(model: torch.nn.Module, path: Path) -> torch.nn.Module:
    """Return the model with a `peft` adapter."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise DePassError(f"{path} is an adapter, which needs the package peft: pip install peft") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*missing adapter keys.*")  # missing weights would be random
            return PeftModel.from_pretrained(model, str(path)).eval()  # type: ignore[arg-type]
    except Exception as error:  # a broken file may raise any error
        faults = {file: fault_of_file(file) for file in sorted(path.iterdir()) if file.is_file()}
        broken = (f"{file} {fault}" for file, fault in faults.items() if fault)
        reason = next(broken, f"{type(error).__name__}: {' '.join(str(error).split()):.300}")
        raise DePassError(f"the adapter {path} cannot be loaded: {reason}") from error


def labelled(entries: Sequence[str]) -> list[str]:
    """Return a short, unique name for each model that is a valid folder name."""
    short = [safe_name(Path(entry).name or "model") for entry in entries]
    numbered = [f"{place}-{name}" for place, name in enumerate(short, start=1)]
    labels = [
        name if short.count(name) == 1 else number for name, number in zip(short, numbered, strict=True)
    ]
    return labels if len(set(labels)) == len(labels) else numbered


def _model_config(config: DictConfig, label: str) -> DictConfig:
    """Return the configuration of one model's run."""
    model_config = config.copy()
    with open_dict(model_config):
        model_config.model.name = label
        model_config.compare = None
    return model_config


def _numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return a summary's plain numbers."""
    numbers = {name: number_of(entry) for name, entry in summary.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with one line per model."""
    names = [name for name in SHOWN if any(row.get(name) is not None for row in rows)]
    columns = (measure_name(name) for name in names)
    table = Table("model", *columns, title="what changed", title_justify="left", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        values = [row.get(name) for name in names]
        shown = ["" if v is None else amount(name, v) for name, v in zip(names, values, strict=True)]
        table.add_row(Text(row["model"]), *shown)
    return table
