"""`python analyze.py compare=[...]`: the same prompts through several checkpoints, revisions or adapters."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from depass_lightning.commands.outputs import example_of, number_of
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.models.checkpoint import is_checkpoint, load_checkpoint
from depass_lightning.models.folder import fault_of_file
from depass_lightning.reports.numbers import amount, measure_name
from depass_lightning.reports.timeline_page import Frame, write_timeline
from depass_lightning.storage import attribution_from_row, write_json
from depass_lightning.utils.atomic_files import safe_name

ADAPTER = "adapter_config.json"
SHOWN = ("correct", "evidence_first", "patch_top_area", "recover_top_area", "cosine", "spearman")


def compare(
    config: DictConfig,
    folder: Path,
    load: Callable[[DictConfig], DePass],
    run: Callable[..., Any],
    console: Console,
) -> int:
    """Attribute a task with each of several models, and write what changed from one to the next.

    Raises:
        DePassError: fewer than two models, two equal ones, or one that cannot be loaded.
    """
    entries = [str(entry) for entry in config.compare]
    if len(entries) < 2 or len(set(entries)) < len(entries):
        raise DePassError(f"compare={entries}: give two different models or more, as compare=[first,second]")
    if config.trainer.get("devices", 1) not in (1, "auto"):
        raise DePassError(
            "compare= runs on one process; leave trainer.devices out, or sweep with -m model=..."
        )
    frames, rows, examples = [], [], {}
    labels = labelled(entries)
    for place, (entry, label) in enumerate(zip(entries, labels, strict=True)):
        load_model = partial(load_entry, entry, config, load)
        results = run(_model_config(config, label), folder / label, load_model).results
        attributions = {row["id"]: attribution_from_row(row) for row in results.rows}
        frames.append(Frame(label, place, attributions))
        rows.append({"model": label, "from": entry} | _numbers(results.summary))
        examples |= {row["id"]: example_of(row) for row in results.rows}
    changes = changed(frames)
    for row, change in zip(rows, changes, strict=True):
        row |= change
    write_json(folder / "compare.json", {"models": rows})
    page = folder / "compare.html"
    title = f"What changed from {labels[0]} to {labels[-1]}"
    subtitle = f"{config.task.name}, {len(labels)} models"
    write_timeline(page, frames, title=title, subtitle=subtitle, examples=examples)
    console.print(_table(rows))
    console.print(Text(f"\npage     {page}\nfolder   {folder}"), soft_wrap=True)
    return 0


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


def changed(frames: Sequence[Frame]) -> list[dict[str, Any]]:
    """Compare each frame's scores with the first frame's, over the prompts that both have."""
    rows = []
    for frame in frames:
        comparisons = [
            frames[0].attributions[id].compare(attribution)
            for id, attribution in frame.attributions.items()
            if id in frames[0].attributions and frames[0].attributions[id].names == attribution.names
        ]
        count = len(comparisons)
        rows.append(
            {
                "prompts_in_both": count,
                "cosine": sum(comparison.cosine for comparison in comparisons) / count if count else None,
                "spearman": sum(comparison.spearman for comparison in comparisons) / count if count else None,
            }
        )
    return rows


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
