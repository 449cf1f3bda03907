"""Shared parts of the commands: show and save the configuration, and report user errors in one line."""

import errno
import functools
import logging
import re
import signal
import sys
import threading
import warnings
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
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
from depass_lightning.commands.shell import JobFailedError, first_process, print_stderr
from depass_lightning.errors import DePassError, reason_of
from depass_lightning.monitoring.sinks import is_named
from depass_lightning.utils.atomic_files import write_whole

console = Console()

INTERRUPTED = 130  # the conventional exit code after Ctrl-C
CONFIG = "config.yaml"
# Errors of a path that the user chose, or of the disk.
PATH_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST)
PATH_ERRNOS += (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
USER_ERRORS = (
    *(DePassError, InstantiationException, MisconfigurationException, OmegaConfBaseException),
    *(ProcessException, OSError),
)

# Lightning's advice about hardware, and a torch warning caused by Lightning's code.
ADVICE = (
    ".*does not have many workers.*",
    ".*LeafSpec.*is deprecated.*",
    "GPU available but not used.*",
    "The `srun` command is available.*",
)


def command(work: Callable[[DictConfig], int]) -> Callable[[DictConfig], None]:
    """Wrap a command: exit with its exit code, and report a user error in one line instead of a traceback."""

    @functools.wraps(work)
    def run(config: DictConfig) -> None:
        end_with_parent()
        silence_hardware_advice()
        before = signal.getsignal(signal.SIGTERM)
        stop_on_sigterm()
        try:
            code = work(config)
        except Terminated:
            code = TERMINATED
            print_stderr("stopped: told to by SIGTERM", "yellow")
        except (KeyboardInterrupt, SystemExit) as error:
            # Lightning raises SystemExit on Ctrl-C.
            if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
                raise
            code = INTERRUPTED
            print_stderr("stopped", "yellow")
        except MissingMandatoryValue as error:
            code = 1
            print_stderr(f"error: {error.full_key} has to be given: {error.full_key}=...", "red")
        except USER_ERRORS as error:
            message = user_error(error)
            if message is None:
                raise
            code = 1
            print_stderr(f"error: {message}", "red")
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)
        # Stopping one job stops the sweep.
        if code not in (0, INTERRUPTED, TERMINATED) and _in_a_sweep():
            raise JobFailedError(code)
        if code:
            sys.exit(code)

    return run


def _in_a_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def open_page(config: DictConfig, page: Path) -> None:
    """Open a page in the browser if `open=true` asks for it, on the first process only."""
    if not config.open or not first_process() or not page.exists():
        return
    if not webbrowser.open(page.resolve().as_uri()):
        print_stderr(f"there is no browser to open the page; its file is {page}", "yellow")


@contextmanager
def skip_unreadable(path: Path) -> Iterator[None]:
    """Skip a file that cannot be read, with a message, whatever error it raises."""
    try:
        yield
    except Exception as error:
        print_stderr(f"{path} is left out: {reason_in_line(error)}", "yellow")


def reason_in_line(error: Exception) -> str:
    """Return the reason for an error in one line."""
    return " ".join(reason_of(error).split())[:300]


def existing_folder(path: str | Path, key: str) -> Path:
    """Return the folder that a setting names.

    Raises:
        DePassError: the value is empty, or there is no such folder.
    """
    if not str(path).strip():
        raise DePassError(f"{key}= names no folder; give one, as {key}=logs/analyze/multiruns/<time>")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DePassError(f"there is no folder {folder} ({key}=)")
    return folder


def predict(
    trainer: Trainer,
    module: LightningModule,
    data: LightningDataModule | DataLoader[Any],
    kept: Callable[[], str],
) -> None:
    """Run `trainer.predict` in all processes; if it is interrupted, print what has been saved."""
    try:
        trainer.predict(module, data, return_predictions=False)
    except BaseException:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)
        if first_process() and (finished := kept()):
            print_stderr(f"{finished}: the same command goes on from there", "yellow")
        raise


def silence_hardware_advice() -> None:
    """Suppress Lightning's advice about hardware."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in ADVICE:
        warnings.filterwarnings("ignore", message)


def work_offline_if_unreachable(name: str) -> None:
    """Switch to offline mode if a model is needed from the hub and the hub does not answer.

    Cached models then still load, and others fail at once instead of after a minute of retries.
    """
    if constants.HF_HUB_OFFLINE or "/" not in name or Path(name).expanduser().exists():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the class depends on huggingface_hub's HTTP client
        constants.HF_HUB_OFFLINE = True


def open_run(config: DictConfig) -> Path:
    """Print the configuration, save it in the run's folder if that has none, and return the folder.

    The configuration of an earlier run is replaced only by `save_config`: this run may still be refused.
    """
    folder = Path(config.paths.output_dir)
    if first_process():
        if not (folder / CONFIG).exists():
            save_config(config, folder)
        if config.get("print_config"):
            console.print(config_tree(config))
    return folder


def save_config(config: DictConfig, folder: Path) -> None:
    """Write the configuration to `config.yaml` in a run's folder, replacing an earlier one."""
    if first_process():
        write_whole(folder / CONFIG, OmegaConf.to_yaml(config, resolve=True).encode())


def config_tree(config: DictConfig) -> Tree:
    """Return the configuration as a tree: one branch per group, its keys in one line."""
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
    """Instantiate a run's loggers, and finish its Weights & Biases run however the command ends.

    A process has one such run at a time: if it stayed open, the next job of a sweep would log to it.
    """
    code = 1
    loggers: list[Logger] = []
    try:
        loggers += instantiate_each(config.get("logger"))
        for logger in loggers:
            if is_named(logger, "UnattendedWandbLogger"):
                unattended: Any = logger  # its module is slow to import
                name = f"{config.task_name} {Path(config.paths.output_dir).name}"
                unattended.describe(name, OmegaConf.to_container(config, resolve=True))
        yield loggers
        code = 0
    finally:
        if any(is_named(logger, "WandbLogger") for logger in loggers):
            import wandb  # slow to import

            if wandb.run is not None:
                wandb.finish(code)


def _inline(value: Any) -> str:
    """Format a branch of the configuration in one line, without empty keys."""
    if isinstance(value, dict):
        return " ".join(
            entry.rpartition(".")[2] if key == "_target_" else f"{key}={_inline(entry)}"
            for key, entry in value.items()
            if entry is not None
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return str(value)


def user_error(error: BaseException) -> str | None:
    """Return the message of an error that the user can fix, unwrapped from Hydra's; None for others."""
    if isinstance(error, OSError) and not isinstance(error, DePassError):
        return f"{error.filename}: {error.strerror}" if error.errno in PATH_ERRNOS else None
    if isinstance(error, MisconfigurationException | OmegaConfBaseException):
        return str(error).strip()
    if isinstance(error, ProcessRaisedException):  # forked: only the traceback's text is available
        match = re.search(r"^depass_lightning[\w.]*Error: (.*)", str(error), re.MULTILINE | re.DOTALL)
        return match[1].strip() if match else None
    if isinstance(error, ProcessException):
        return f"a process was lost ({error})"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DePassError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, InstantiationException):
        message = str(error.__cause__ or error).strip()
        key = re.search(r"full_key: (\S+)", str(error))
        return f"{key[1]}: {message}" if key else message
    return None
