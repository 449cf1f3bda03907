"""A run's folder: who writes to it, and whether a run that was interrupted goes on in it.

`hydra.run.dir` has the time in it, so the same command started again would find nothing of what it has done.
`Resume` is a Hydra callback that looks for a run of the very same command line that has not ended, before
Hydra makes a folder, and gives Hydra that run's.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from depass_lightning.commands.console import first_process, tell
from depass_lightning.errors import DePassError
from depass_lightning.storage import OtherRunError
from depass_lightning.storage.manifest import NAME
from depass_lightning.utils.atomic_files import remove_halves

try:
    import fcntl
except ImportError:  # Windows: nothing says then that two processes share a folder
    fcntl = None

UNFINISHED = ".unfinished"
PATIENCE = 5.0  # seconds


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a run's folder, and leave a mark in it until the run has ended well.

    Args:
        folder: the run's folder.

    Raises:
        DePassError: another process holds it.
    """
    if not first_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / UNFINISHED
    file = _hold(mark)
    if file is None:
        raise DePassError(
            f"another process is at work in {folder}; wait for it, or give another folder (hydra.run.dir=...)"
        )
    with file:
        file.seek(0)
        before = file.read()
        _write(file, json.dumps(_typed()))
        remove_halves(folder)
        try:
            yield
        except OtherRunError:  # that one's mark stays as it was
            if before:
                _write(file, before)
            else:
                mark.unlink(missing_ok=True)
            raise
        mark.unlink(missing_ok=True)


class Resume(Callback):
    """Let a command that was interrupted go on in its folder when it is started again.

    `resume=false`, and a folder that was given and has results, make a new folder beside it.
    """

    def __init__(self) -> None:
        self.mark: TextIO | None = None

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        if not first_process():  # it is told the folder by the first one
            return
        given = any(override.startswith("hydra.run.dir=") for override in config.hydra.overrides.hydra)
        folder = Path(config.hydra.run.dir)
        found = _continued(config, folder, given)
        if found != folder:
            with read_write(config), open_dict(config):
                config.hydra.run.dir = str(found)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if not first_process():
            return
        given = any(override.startswith("hydra.sweep.dir=") for override in config.hydra.overrides.hydra)
        folder = Path(config.hydra.sweep.dir)
        found = _continued(config, folder, given)
        with read_write(config), open_dict(config):
            if found != folder:
                config.hydra.sweep.dir = str(found)
                # Each job's configuration is composed anew, of what was typed.
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir={found}")
        found.mkdir(parents=True, exist_ok=True)
        self.mark = _hold(found / UNFINISHED)
        if self.mark is None:  # Hydra would make a warning of an error
            tell(
                f"error: another sweep is at work in {found}; wait for it, or give another folder "
                "(hydra.sweep.dir=...)",
                "red",
            )
            sys.exit(1)
        _write(self.mark, json.dumps(_overrides(config)))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if self.mark is not None:
            Path(self.mark.name).unlink(missing_ok=True)
            self.mark.close()


def _continued(config: DictConfig, folder: Path, given: bool) -> Path:
    """Return the folder to use: the given one, an unfinished one, or one that is new."""
    if given:
        if config.get("resume", True) or not any(folder.rglob(NAME)):
            return folder
        number = 2
        while (other := folder.with_name(f"{folder.name}-{number}")).exists():
            number += 1
        return other
    if not config.get("resume", True):
        return folder
    for mark in sorted(folder.parent.glob(f"*/{UNFINISHED}"), reverse=True):
        if _free(mark) and _read(mark) == _overrides(config):
            tell(f"goes on with {mark.parent} (resume=false begins anew)", "yellow")
            return mark.parent
    return folder


def _overrides(config: DictConfig) -> list[str]:
    """What was typed, less what changes nothing of the results."""
    both = [*config.hydra.overrides.task, *config.hydra.overrides.hydra]
    return sorted(own for own in map(str, both) if not own.startswith(("hydra.mode=", "resume=")))


def _typed() -> list[str]:
    """What was typed for the run that is under way."""
    if not HydraConfig.initialized():
        return []
    return _overrides(OmegaConf.create({"hydra": {"overrides": HydraConfig.get().overrides}}))


def _hold(mark: Path) -> TextIO | None:
    """Open a folder's mark and lock it; return None where another process holds it all the while."""
    started = time.monotonic()
    while True:
        file = mark.open("a+")
        if _locked(file.fileno()) and _is_at(file.fileno(), mark):
            return file
        file.close()
        # Processes of a run that was killed take a moment to notice.
        if time.monotonic() - started >= PATIENCE:
            return None
        time.sleep(0.1)


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still what its path names: whoever held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _write(file: TextIO, text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()


def _read(mark: Path) -> Sequence[str] | None:
    try:
        return json.loads(mark.read_text())
    except (OSError, ValueError):
        return None


def _locked(file: int) -> bool:
    """Lock a file for as long as it is open, or say that another process has."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _free(mark: Path) -> bool:
    """Whether no process holds the folder of a mark."""
    try:
        with mark.open() as file:
            return _locked(file.fileno())
    except FileNotFoundError:  # it has ended meanwhile
        return False
