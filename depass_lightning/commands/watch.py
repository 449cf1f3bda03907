"""`python analyze.py watch.folder=...`: attribute the checkpoints of any training as they appear.

1. The folder is searched for checkpoints: model folders, adapters, and Lightning's or other weight files.
2. One is taken when its files have not changed between two searches, in the order of steps.
3. The task's prompts are attributed, the run is appended to one history, and the state is saved; the same
   command, started again, goes on after the last checkpoint.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from rich.text import Text

from depass_lightning.commands.attribute_task import rule_options, task_of
from depass_lightning.commands.compare import load_entry
from depass_lightning.commands.console import console, existing_folder, loggers_of
from depass_lightning.commands.shell import print_stderr
from depass_lightning.commands.timeline import write_timelines
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.models.checkpoint import SUFFIXES
from depass_lightning.models.folder import ADAPTER, WEIGHTS
from depass_lightning.monitoring.monitor import ProbeMonitor
from depass_lightning.monitoring.sinks import sinks_of
from depass_lightning.tasks import Task
from depass_lightning.utils.atomic_files import whole_file

STATE = "watch.pt"
FILES = set(SUFFIXES) - set(WEIGHTS)  # those are parts of a model's folder
STEP = re.compile(r"step[=_-]?(\d+)", re.IGNORECASE)
Stamp = tuple[tuple[str, int, int], ...]  # each file's path, size and time


def watch(config: DictConfig, folder: Path, load: Callable[[DictConfig], DePass]) -> int:
    """Attribute every checkpoint of the watched folder until `watch.until`, and return the exit code.

    Raises:
        DePassError: there is no such folder, or a setting does not suit probes.
    """
    watched = existing_folder(config.watch.folder, "watch.folder")
    task = task_of(config)
    make_monitor(config, task)  # finds a mistake before the first checkpoint appears
    with loggers_of(config) as loggers:
        watcher = Watcher(config, folder, watched, task, load, loggers)
        while not watcher.done:
            if not watcher.search():
                time.sleep(config.watch.poll)
    if len(watcher.steps) > 1:
        for page in write_timelines(folder):
            console.print(Text(f"timeline {page}"), soft_wrap=True)
    return 0


def make_monitor(config: DictConfig, task: Task) -> ProbeMonitor:
    """Return a monitor of the task's prompts under the configured source and rule."""
    return ProbeMonitor(
        None,
        None,
        {config.task.name: task},
        size=len(task),
        source=instantiate(config.source, _convert_="all"),
        target=config.target.kind,
        answer=config.target.get("answer", "whole"),
        batch_size=config.batch_size,
        faithfulness=0 if config.faithfulness is None else len(task),
        bias=config.bias,
        attention_path=config.attention_path,
        **rule_options(config),
    )


class Watcher:
    """Searches a folder for new checkpoints, and attributes them."""

    def __init__(
        self,
        config: DictConfig,
        folder: Path,
        watched: Path,
        task: Task,
        load: Callable[[DictConfig], DePass],
        loggers: list[Logger],
    ) -> None:
        self._config, self._folder, self._watched = config, folder, watched
        self._task, self._load, self._loggers = task, load, loggers
        self._monitor: ProbeMonitor | None = None
        self._stamps: dict[Path, Stamp] = {}
        self._refused: dict[Path, Stamp] = {}
        self._state: Any = None
        if (folder / STATE).is_file():
            self._state = torch.load(folder / STATE, weights_only=True)

    @property
    def steps(self) -> list[int]:
        """The steps that were attributed."""
        histories = self._state["history"].values() if self._state else ()
        return next((list(history["steps"]) for history in histories), [])

    @property
    def done(self) -> bool:
        """Whether the last step was attributed."""
        until = self._config.watch.until
        return until is not None and any(step >= until for step in self.steps)

    def search(self) -> bool:
        """Attribute the first whole checkpoint of a later step, and return whether there was one."""
        last = max(self.steps, default=-1)
        before, self._stamps = self._stamps, {path: stamp_of(path) for path in checkpoints(self._watched)}
        for path in sorted(self._stamps, key=lambda path: (step_of(path), path)):
            stamp = self._stamps[path]
            if step_of(path) > last and stamp and before.get(path) == stamp != self._refused.get(path):
                try:
                    self._attribute(path)
                except DePassError as error:
                    self._refused[path] = stamp  # until its files change
                    print_stderr(f"{path} is left out: {error}", "yellow")
                else:
                    return True
        return False

    def _attribute(self, path: Path) -> None:
        depass = load_entry(str(path), self._config, self._load)
        if self._monitor is None:
            monitor = make_monitor(self._config, self._task.formatted(depass.tokenizer))
            if self._state is not None:
                monitor.load_state_dict(self._state)
            self._monitor = monitor
        self._monitor.bind(depass.model, [depass.tokenizer])  # type: ignore[arg-type]
        result = self._monitor.run(step_of(path))
        self._monitor.release()
        self._monitor.publish(result, sinks_of(self._loggers), self._folder)
        self._state = self._monitor.state_dict()
        with whole_file(self._folder / STATE) as file:
            torch.save(self._state, file)
        numbers = (f"{name} {result.results[0].metrics[name]:.3f}" for name in ("value", "probability"))
        console.print(Text(f"step {result.step}  {'  '.join(numbers)}  {path}"), soft_wrap=True)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints below a folder whose names have a step."""
    models = {path.parent for name in ("config.json", ADAPTER) for path in folder.rglob(name)}
    files = {path for path in folder.rglob("*") if path.suffix in FILES and path.parent not in models}
    return [path for path in models - {folder} | files if step_of(path) >= 0]


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name: the number after `step`, else the last number; -1 for none.

    Args:
        path: such as `checkpoint-120`, `epoch=1-step=240.ckpt` or `iter_0000500`.
    """
    named = STEP.findall(path.stem if path.suffix in FILES else path.name)
    numbers = named or re.findall(r"\d+", path.stem if path.suffix in FILES else path.name)
    return int(numbers[-1]) if numbers else -1


def stamp_of(path: Path) -> Stamp:
    """Return what changes while a checkpoint is written; empty if it has no weights yet, or was removed."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        if path.is_dir() and not any(file.suffix in WEIGHTS for file in files):
            return ()
        stats = [(file.name, file.stat()) for file in files]
    except FileNotFoundError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
