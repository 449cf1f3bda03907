"""`python analyze.py experiment=paper_...`: one of the paper's experiments, from configuration to page."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from depass_lightning.commands.common import first_process
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.experiments.results import terminal_table, write_experiment


def run_study(
    config: DictConfig, folder: Path, load: Callable[[DictConfig], DePass], console: Console
) -> int:
    """Run an experiment, print its table, and say where its page is.

    Args:
        config: the configuration; its `study` says what is done.
        folder: where to write.
        load: loads the model that a configuration names.
        console: where to print.

    Raises:
        DePassError: several processes are asked for, or as for the experiment.
    """
    trainer: Trainer = instantiate(config.trainer, _partial_=True)(logger=False)
    if trainer.world_size > 1:
        raise DePassError("an experiment runs on one process; leave trainer.devices out, or sweep with -m")
    study = instantiate(config.study, _convert_="all")
    depass = load(config)
    if getattr(depass.model, "hf_device_map", None) is None:  # else it has been placed already
        depass.model.to(trainer.strategy.root_device)
    found = study.run(depass, folder, progress=first_process())
    experiment = replace(found, command=" ".join(["python analyze.py", *_typed()]))
    write_experiment(experiment, folder)
    console.print()
    console.print(terminal_table(experiment, console.width))
    for note in experiment.notes:
        console.print(Text(note, "dim"))
    console.print()
    console.print(Text(f"page     {folder / 'report.html'}\nfolder   {folder}"), soft_wrap=True)
    return 0


def _typed() -> list[str]:
    """What was typed behind the command's name."""
    return [shlex.quote(own) for own in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []
