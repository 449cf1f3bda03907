"""`python analyze.py experiment=paper_...`: run one of the paper's experiments and write its page."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text
from torch.utils.data import DataLoader, TensorDataset

from depass_lightning.callbacks import ProcessMonitor
from depass_lightning.commands.console import instantiate_each, predict
from depass_lightning.depass import DePass
from depass_lightning.modules.study_module import StudyModule
from depass_lightning.studies.study_files import read_experiment, terminal_table, write_experiment


def run_study(
    config: DictConfig, folder: Path, load: Callable[[DictConfig], DePass], console: Console
) -> int:
    """Run an experiment, and print its table and the path of its page.

    Raises:
        DePassError: the experiment's settings do not fit the model or the data.
    """
    study = instantiate(config.study, _convert_="all")
    # Methods need gradients, and every process runs the single step.
    trainer: Trainer = instantiate(config.trainer, _partial_=True)(
        callbacks=[ProcessMonitor(), *instantiate_each(config.get("callbacks"))],
        logger=False,
        enable_progress_bar=False,
        inference_mode=False,
        use_distributed_sampler=False,
    )
    module = StudyModule(study, load(config), folder)
    predict(trainer, module, DataLoader(TensorDataset(torch.zeros(1))), lambda: _kept(folder / "rows"))
    if not trainer.is_global_zero:
        return 0
    experiment = replace(read_experiment(folder), command=" ".join(["python analyze.py", *_typed()]))
    write_experiment(experiment, folder)
    console.print()
    console.print(terminal_table(experiment, console.width))
    for note in experiment.notes:
        console.print(Text(note, "dim"))
    console.print()
    console.print(Text(f"page     {folder / 'report.html'}\nfolder   {folder}"), soft_wrap=True)
    return 0


def _kept(rows: Path) -> str:
    """Name the finished parts of an interrupted experiment."""
    finished = sorted(path.stem for path in rows.glob("*.parquet"))
    return f"{', '.join(finished)} done, in {rows}" if finished else ""


def _typed() -> list[str]:
    """Return the command line's arguments."""
    if not HydraConfig.initialized():
        return []
    return [shlex.quote(override) for override in HydraConfig.get().overrides.task]
