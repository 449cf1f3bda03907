"""What the commands share: a configuration that is shown and kept, and mistakes that are told in one line."""

import errno
import functools
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from rich.console import Console
from rich.text import Text
from rich.tree import Tree
from torch.multiprocessing.spawn import ProcessException, ProcessRaisedException
from torch.utils.data import DataLoader

from depass_lightning.callbacks.process_monitor import (
    TERMINATED,
    Terminated,
    end_with_parent,
    stop_on_sigterm,
)
from depass_lightning.errors import DePassError, reason_of
from depass_lightning.monitoring.publish import is_named
from depass_lightning.utils.atomic_files import write_whole

console = Console()

INTERRUPTED = 130  # by Ctrl-C: a process's exit code, by custom
CONFIG = "config.yaml"
HYDRA = ".hydra"
# What is wrong with a place that was given, or with a disk.
PLACES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST)
PLACES += (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
MISTAKES = (
    *(DePassError, InstantiationException, MisconfigurationException, OmegaConfBaseException),
    *(ProcessException, OSError),
)

# What Lightning says about machines, and what torch says about Lightning's own code.
ADVICE = (
    ".*does not have many workers.*",
    ".*LeafSpec.*is deprecated.*",
    "GPU available but not used.*",
    "The `srun` command is available.*",
)


def command(work: Callable[[DictConfig], int]) -> Callable[[DictConfig], None]:
    """Wrap a command's work, so that it ends with an exit code, and a mistake with one clear line.

    Args:
        work: does what the configuration says and returns the exit code.
    """

    @functools.wraps(work)
    def run(config: DictConfig) -> None:
        end_with_parent()
        quiet()
        before = signal.getsignal(signal.SIGTERM)
        stop_on_sigterm()
        try:
            code = work(config)
        except Terminated:
            code = TERMINATED
            tell("stopped: told to by SIGTERM", "yellow")
        except (KeyboardInterrupt, SystemExit) as error:
            # Lightning turns an interruption into an exit of its own.
            if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
                raise
            code = INTERRUPTED
            tell("stopped", "yellow")
        except MissingMandatoryValue as error:
            code = 1
            tell(f"error: {error.full_key} has to be given: {error.full_key}=...", "red")
        except MISTAKES as error:
            mistake = _mistake(error)
            if mistake is None:
                raise
            code = 1
            tell(f"error: {mistake}", "red")
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)
        # Who stops a job means the sweep.
        if code not in (0, INTERRUPTED, TERMINATED) and _in_a_sweep():
            raise JobFailed(code)
        if code:
            sys.exit(code)

    return run


def shell(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command's entry, so that what Hydra itself refuses is told without a traceback as well.

    Args:
        main: composes the configuration and does the work.
    """

    @functools.wraps(main)
    def start() -> None:
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints a traceback, and ends by itself
        try:
            main()
        except JobFailed:  # told when it happened
            sys.exit(1)
        except Exception as error:
            began = any(
                frame.f_code.co_name == "run_job" for frame, _ in traceback.walk_tb(error.__traceback__)
            )
            mistake = _mistake(error)
            if mistake is None and (isinstance(error, CompactHydraException) or not began):
                mistake = "\n".join(str(own) for own in (error, error.__cause__) if own is not None)
            if mistake is None:
                raise
            tell(f"error: {mistake}", "red")
            sys.exit(1)

    return start


class JobFailed(RuntimeError):
    """One job of a sweep has failed: the others go on, and the sweep's own exit code says so at the end."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}; what went wrong is told above")


def _in_a_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def first_process() -> bool:
    """Say whether this is the process that speaks and writes for all."""
    return getattr(rank_zero_only, "rank", None) in (None, 0)


def tell(line: str, style: str = "") -> None:
    """Print one line to the standard error, on the first process alone."""
    if first_process():
        Console(stderr=True, soft_wrap=True).print(Text(line, style))


@contextmanager
def left_out(path: Path) -> Iterator[None]:
    """Say that a file is left out where it cannot be read, whatever is wrong with it, and go on."""
    try:
        yield
    except Exception as error:
        tell(f"{path} is left out: {told(error)}", "yellow")


def told(error: Exception) -> str:
    """Return why something failed, in one line."""
    return " ".join(reason_of(error).split())[:300]


def folder_of(given: str | Path, key: str) -> Path:
    """Return a folder that a setting names.

    Args:
        given: the setting.
        key: its name, for the error.

    Raises:
        DePassError: it names none, or there is no such folder.
    """
    if not str(given).strip():
        raise DePassError(f"{key}= names no folder; give one, as {key}=logs/analyze/multiruns/<time>")
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise DePassError(f"there is no folder {folder} ({key}=)")
    return folder


def predict(
    trainer: Trainer,
    module: LightningModule,
    data: LightningDataModule | DataLoader[Any],
    kept: Callable[[], str],
) -> None:
    """Predict in all processes, and say what is kept where that is interrupted.

    Args:
        trainer: starts the processes.
        module: does the work.
        data: what it works on.
        kept: says what is done by then; nothing is said where that is empty.
    """
    try:
        trainer.predict(module, data, return_predictions=False)
    except BaseException:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)
        if first_process() and (done := kept()):
            tell(f"{done}: the same command goes on from there", "yellow")
        raise


def quiet() -> None:
    """Keep Lightning's advice on hardware, which the reader did not ask for, out of the output."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in ADVICE:
        warnings.filterwarnings("ignore", message)


def expect_hub(name: str) -> None:
    """Work offline where a model has to come from the hub and the hub does not answer.

    What is in the cache loads all the same, and what is not fails at once, not after a minute of retries.
    """
    if constants.HF_HUB_OFFLINE or "/" not in name or Path(name).expanduser().exists():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # which class depends on the client that the hub's package brings
        constants.HF_HUB_OFFLINE = True


def open_run(config: DictConfig) -> Path:
    """Show the configuration, keep it in the run's folder where that has none, and return the folder.

    An earlier run's stays until `keep_config` is called: this run may yet be refused.
    """
    folder = Path(config.paths.output_dir)
    if first_process():
        if not (folder / CONFIG).exists():
            keep_config(config, folder)
        if config.get("print_config"):
            console.print(config_tree(config))
    return folder


def keep_config(config: DictConfig, folder: Path) -> None:
    """Write the configuration as `config.yaml` into a run's folder, in place of what is there."""
    if first_process():
        write_whole(folder / CONFIG, OmegaConf.to_yaml(config, resolve=True).encode())


def _hydra_folder(run: str) -> str | None:
    """Return where Hydra keeps what was typed: nowhere if an earlier run's is there, or on other ranks."""
    return None if (Path(run) / HYDRA).exists() or not first_process() else HYDRA


OmegaConf.register_new_resolver("hydra_folder", _hydra_folder, replace=True)


def config_tree(config: DictConfig) -> Tree:
    """Return the configuration as a tree: one branch a group, its keys in a line."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    tree = Tree(Text(str(config.task_name), "bold"), guide_style="dim")
    for key, value in plain.items():
        if key not in ("task_name", "print_config", "paths") and value not in (None, [], {}):
            tree.add(Text.assemble((f"{key}  ", "cyan"), _inline(value)))
    return tree


def instantiate_each(group: DictConfig | None) -> list[Any]:
    """Instantiate every entry of a group of callbacks or loggers."""
    entries = [] if group is None else list(group.values())
    return [instantiate(entry) for entry in entries if isinstance(entry, DictConfig) and "_target_" in entry]


@contextmanager
def loggers_of(config: DictConfig) -> Iterator[list[Logger]]:
    """Instantiate a run's loggers, and end what Weights & Biases recorded for it, however the run ends.

    A process has one such run at a time: left open, the next job of a sweep would go on in it.

    Args:
        config: the configuration; its `logger` has an entry a logger.
    """
    code = 1
    loggers: list[Logger] = []
    try:
        loggers += instantiate_each(config.get("logger"))
        yield loggers
        code = 0
    finally:
        if any(is_named(logger, "WandbLogger") for logger in loggers):
            import wandb  # takes a second, which only those who use it should wait

            if wandb.run is not None:
                wandb.finish(code)


def _inline(value: Any) -> str:
    """Write a branch of the configuration in one line, empty keys left out."""
    if isinstance(value, dict):
        parts = {k: v for k, v in value.items() if v is not None}
        written = (v.rpartition(".")[2] if k == "_target_" else f"{k}={_inline(v)}" for k, v in parts.items())
        return " ".join(written)
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return str(value)


def _mistake(error: BaseException) -> str | None:
    """Return what the caller did wrong, where that is what the error says; Hydra may have wrapped it."""
    if isinstance(error, OSError) and not isinstance(error, DePassError):
        return f"{error.filename}: {error.strerror}" if error.errno in PLACES else None
    if isinstance(error, MisconfigurationException | OmegaConfBaseException):
        return str(error).strip()
    if isinstance(error, ProcessRaisedException):  # in a forked process, whose traceback is all that is left
        found = re.search(r"^depass_lightning[\w.]*Error: (.*)", str(error), re.MULTILINE | re.DOTALL)
        return found[1].strip() if found else None
    if isinstance(error, ProcessException):
        return f"a process was lost ({error})"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DePassError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, InstantiationException):
        told = str(error.__cause__ or error).strip()
        return f"{found[1]}: {told}" if (found := re.search(r"full_key: (\S+)", str(error))) else told
    return None
