"""Check how a command is launched, and name a launch that works instead of one that does not.

All processes of a run must use the same folder, whose name contains the time:

- `trainer.strategy=ddp`: Lightning runs the command line again for each further process. It passes on the
  folder of a run, but not that of a sweep (`-m`), and a joblib or submitit worker has no command line.
- `torchrun` and `srun` run the command line several times and pass on no folder.
- `trainer.strategy=ddp_fork` forks, on CPUs only, and passes on everything.
- submitit's SLURM launcher starts `hydra.launcher.tasks_per_node` processes.
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
from typing_extensions import override

from depass_lightning.commands.shell import print_stderr
from depass_lightning.errors import DePassError

WITHOUT_COMMAND_LINE = ("fork", "spawn", "notebook")  # parts of these strategies' names
WORKERS = {"JoblibLauncher": "joblib", "LocalLauncher": "submitit_local"}


def check_launch(config: DictConfig) -> None:
    """Refuse a launch of `analyze.py` that would hang, or whose processes would use different folders.

    Raises:
        DePassError: the launch cannot work; the message names one that does.
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
    """Check a sweep before its first job starts: on a cluster, jobs may wait for hours."""

    @override
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        try:
            _check(config, config.hydra)
        except DePassError as error:  # Hydra turns exceptions of callbacks into warnings
            print_stderr(f"error: {error}", "red")
            sys.exit(1)


def _check(config: DictConfig, hydra: DictConfig) -> None:
    """Refuse a launch that cannot work."""
    if config.get("serve") and hydra.mode == RunMode.MULTIRUN:
        raise DePassError("serve=true serves one page until Ctrl-C, so that a sweep never ends; leave out -m")
    processes, strategy = _processes(config), _strategy(config)
    launcher = str(hydra.launcher._target_).rpartition(".")[2]
    sweep = hydra.mode == RunMode.MULTIRUN
    if sweep and launcher == "SlurmLauncher":
        return _check_slurm(processes, hydra.launcher)
    starter, started = _started()
    if starter:
        return _check_started(starter, started, processes, hydra, launcher if sweep else None)
    if not sweep or processes == 1 or any(word in strategy for word in WITHOUT_COMMAND_LINE):
        return None
    if launcher in WORKERS:
        raise DePassError(
            f"a job of {WORKERS[launcher]} cannot start further processes by trainer.strategy={strategy}: "
            "take trainer.devices=1, since the jobs already run in parallel, or trainer.strategy=ddp_fork on "
            "processors, or leave out hydra/launcher="
        )
    if _has_time(hydra.sweep, "dir"):
        raise DePassError(
            f"with -m, every process of trainer.strategy={strategy} would make a separate folder: give "
            "hydra.sweep.dir=logs/analyze/multiruns/<a name>"
        )
    return None


def _check_slurm(processes: int, launcher: DictConfig) -> None:
    """Refuse a number of processes other than SLURM starts."""
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
    """Check the processes that `torchrun` or `srun` has started."""
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
            f"every process that {starter} starts would make a separate folder: give "
            f"hydra.{name}.dir=logs/analyze/{folders}/<a name>"
        )


def _started() -> tuple[str, int]:
    """Return the program that started this process and its number of processes; "" and 1 if there is none."""
    if TorchElasticEnvironment.detect():
        return "torchrun", int(os.environ["WORLD_SIZE"])
    if SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1:
        return "srun", int(os.environ["SLURM_NTASKS"])
    return "", 1


def _processes(config: DictConfig) -> int:
    """Return the number of processes that the trainer expects."""
    devices = config.trainer.get("devices", 1)
    if isinstance(devices, str) and "," in devices:
        count = len([device for device in devices.split(",") if device.strip()])
    elif OmegaConf.is_list(devices):
        count = len(devices)
    elif str(devices) in ("auto", "-1"):
        count = 1 if config.trainer.get("accelerator") == "cpu" else max(1, torch.cuda.device_count())
    else:
        count = int(devices)
    return count * config.trainer.get("num_nodes", 1)


def _strategy(config: DictConfig) -> str:
    """Return the strategy's name; Lightning's default for several processes is ddp."""
    strategy = config.trainer.get("strategy", "auto")
    name = strategy if isinstance(strategy, str) else strategy.get("_target_", "").rpartition(".")[2]
    return "ddp" if name == "auto" else name.lower()


def _has_time(part: DictConfig, key: str) -> bool:
    """Return whether a folder's name contains the time, which differs between processes."""
    plain = OmegaConf.to_container(part, resolve=False)
    assert isinstance(plain, dict)
    return "${now:" in str(plain[key])
