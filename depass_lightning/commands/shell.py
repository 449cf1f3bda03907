"""What a command line needs before Hydra has parsed it, without importing torch, transformers and Lightning.

So `--help`, shell completion and errors about wrong keys take about a second.
"""

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import CompactHydraException
from omegaconf import OmegaConf
from rich.console import Console
from rich.text import Text

from depass_lightning.errors import DePassError

HYDRA = ".hydra"
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # where Lightning looks for a process's rank, in this order


def shell(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command's entry point, to report errors of Hydra without a traceback, too."""

    @functools.wraps(main)
    def start() -> None:
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints a traceback and exits
        try:
            main()
        except JobFailedError:  # already reported
            sys.exit(1)
        except Exception as error:
            began = any(
                frame.f_code.co_name == "run_job" for frame, _ in traceback.walk_tb(error.__traceback__)
            )
            message = _user_error(error)
            if message is None and (isinstance(error, CompactHydraException) or not began):
                message = "\n".join(str(cause) for cause in (error, error.__cause__) if cause is not None)
            if message is None:
                raise
            print_stderr(f"error: {message}", "red")
            sys.exit(1)

    return start


class JobFailedError(RuntimeError):
    """One job of a sweep failed; the other jobs still run, and the sweep exits with an error at the end."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}; the error is printed above")


def _hydra_folder(run: str) -> str | None:
    """Return Hydra's output folder; None if an earlier run's exists, or on other ranks."""
    return None if (Path(run) / HYDRA).exists() or not first_process() else HYDRA


OmegaConf.register_new_resolver("hydra_folder", _hydra_folder, replace=True)


def _user_error(error: Exception) -> str | None:
    """Return the message of an error that the user can fix; None for others."""
    console = sys.modules.get("depass_lightning.commands.console")
    if console is not None:  # it knows the errors of the libraries that it imports
        return console.user_error(error)
    return str(error) if isinstance(error, DePassError) else None


def first_process() -> bool:
    """Return whether this is the process that prints and writes for all of them."""
    utilities = sys.modules.get("lightning.pytorch.utilities")
    if utilities is not None:
        return getattr(utilities.rank_zero_only, "rank", None) in (None, 0)
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


def print_stderr(line: str, style: str = "") -> None:
    """Print one line to standard error, on the first process only."""
    if first_process():
        Console(stderr=True, soft_wrap=True).print(Text(line, style))


@contextmanager
def waiting(reason: str) -> Iterator[None]:
    """Show what a command waits for, with a spinner, in a terminal and on the first process only."""
    console = Console(stderr=True)
    if not (console.is_terminal and first_process()):
        yield
        return
    with console.status(Text(reason, "dim")):
        yield
