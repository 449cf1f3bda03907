"""Which ways of starting a command work, and which one to take instead of one that does not.

What starts the processes of a run must also tell them its folder, whose name has the time in it:

- `trainer.strategy=ddp`: Lightning starts the command line again for each further process. It hands on the
  folder of a run, but not that of a sweep (`-m`), and a worker of joblib or submitit has no command line.
- `torchrun` and `srun` start the command line several times, and hand on no folder at all.
- `trainer.strategy=ddp_fork` forks, on processors alone, and everything is handed on.
- submitit's SLURM launcher starts as many processes as `hydra.launcher.tasks_per_node` says.
"""

import os
import sys
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf

from depass_lightning.commands.console import tell
from depass_lightning.errors import DePassError

RELATIVES = ("fork", "spawn", "notebook")  # strategies that start processes without a command line
WORKERS = {"JoblibLauncher": "joblib", "LocalLauncher": "submitit_local"}


def check_launch(config: DictConfig) -> None:
    """Refuse a way of starting `analyze.py` that would hang, or whose processes would not find each other.

    Args:
        config: the configuration of a run, or of one job of a sweep.

    Raises:
        DePassError: naming the way that works.
    """
    strategy = _strategy(config)
    if _processes(config) > 1 and "spawn" in strategy:
        raise DePassError(
            f"trainer.strategy={strategy} cannot hand its processes what they need; take ddp, or ddp_fork on "
            "processors"
        )
    if _processes(config) > 1 and config.model.get("device_map") is not None:
        raise DePassError(
            f"model.device_map={config.model.device_map} would place a whole model in each of "
            f"{_processes(config)} processes, on the same devices; take trainer.devices=1, which uses them "
            "all, or leave out model.device_map"
        )
    if HydraConfig.initialized():
        hydra: Any = HydraConfig.get()
        _check(config, hydra)


class CheckLaunch(Callback):
    """Check a sweep before any of its jobs is started: on a cluster they may wait for hours."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        try:
            _check(config, config.hydra)
        except DePassError as error:  # Hydra would make a warning of it
            tell(f"error: {error}", "red")
            sys.exit(1)


def _check(config: DictConfig, hydra: DictConfig) -> None:
    """Refuse what does not work.

    Args:
        config: the configuration of a run or of a sweep.
        hydra: Hydra's own.
    """
    processes, strategy = _processes(config), _strategy(config)
    launcher = str(hydra.launcher._target_).rpartition(".")[2]
    sweep = hydra.mode == RunMode.MULTIRUN
    if sweep and launcher == "SlurmLauncher":
        return _check_slurm(processes, hydra.launcher)
    starter, started = _started()
    if starter:
        return _check_started(starter, started, processes, hydra, launcher if sweep else None)
    if not sweep or processes == 1 or any(word in strategy for word in RELATIVES):
        return None
    if launcher in WORKERS:
        raise DePassError(
            f"a job of {WORKERS[launcher]} cannot start further processes by trainer.strategy={strategy}: "
            "take trainer.devices=1, as the jobs are side by side already, or trainer.strategy=ddp_fork on "
            "processors, or leave out hydra/launcher="
        )
    if _has_time(hydra.sweep, "dir"):
        raise DePassError(
            f"with -m, every process of trainer.strategy={strategy} would make a folder of its own: give "
            "hydra.sweep.dir=logs/analyze/multiruns/<a name>"
        )
    return None


def _check_slurm(processes: int, launcher: DictConfig) -> None:
    """SLURM itself starts the processes of a job."""
    tasks = launcher.tasks_per_node * launcher.nodes
    if processes != tasks:
        raise DePassError(
            f"SLURM starts a job's processes, {tasks} of them, but the trainer wants {processes}: take "
            f"hydra/launcher=slurm_node hydra.launcher.tasks_per_node={processes} "
            f"hydra.launcher.gpus_per_node={processes}, or trainer.devices=1"
        )


def _check_started(
    starter: str, started: int, processes: int, hydra: DictConfig, launcher: str | None
) -> None:
    """Check what `torchrun` or `srun` has started.

    Args:
        starter: which of them.
        started: how many processes.
        processes: how many the trainer wants.
        hydra: Hydra's configuration.
        launcher: that of a sweep; None for a single run.
    """
    if launcher not in (None, "BasicLauncher"):
        raise DePassError(f"{starter} and hydra/launcher= both start jobs; leave out one of them")
    if processes != started:
        raise DePassError(
            f"{starter} has started {started} processes, but the trainer wants {processes}: give "
            f"trainer.devices={started} trainer.strategy=ddp, or start the command without {starter}"
        )
    part, folders = (hydra.run, "runs") if launcher is None else (hydra.sweep, "multiruns")
    name = "run" if launcher is None else "sweep"
    if started > 1 and _has_time(part, "dir"):
        raise DePassError(
            f"every process that {starter} starts would make a folder of its own: give "
            f"hydra.{name}.dir=logs/analyze/{folders}/<a name>"
        )


def _started() -> tuple[str, int]:
    """Return what has started this process beside others, and how many there are; "" where nothing has."""
    if TorchElasticEnvironment.detect():
        return "torchrun", int(os.environ["WORLD_SIZE"])
    if SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1:
        return "srun", int(os.environ["SLURM_NTASKS"])
    return "", 1


def _processes(config: DictConfig) -> int:
    """Return how many processes the trainer wants."""
    devices = config.trainer.get("devices", 1)
    if isinstance(devices, str) and "," in devices:
        count = len([own for own in devices.split(",") if own.strip()])
    elif OmegaConf.is_list(devices):
        count = len(devices)
    elif str(devices) in ("auto", "-1"):
        count = 1 if config.trainer.get("accelerator") == "cpu" else max(1, torch.cuda.device_count())
    else:
        count = int(devices)
    return count * config.trainer.get("num_nodes", 1)


def _strategy(config: DictConfig) -> str:
    """Return the strategy's name; of several processes, Lightning's own choice is ddp."""
    strategy = config.trainer.get("strategy", "auto")
    name = strategy if isinstance(strategy, str) else strategy.get("_target_", "").rpartition(".")[2]
    return "ddp" if name == "auto" else name.lower()


def _has_time(part: DictConfig, key: str) -> bool:
    """Whether a folder's name has the time in it, which every process would tell for itself."""
    plain = OmegaConf.to_container(part, resolve=False)
    assert isinstance(plain, dict)
    return "${now:" in str(plain[key])
