"""Lock a run's folder, and resume an interrupted run in it.

`hydra.run.dir` contains the time, so the same command started again would not find its earlier results.
`Resume` is a Hydra callback that runs before Hydra creates a folder. It looks for an unfinished run of the
same command line, and passes that run's folder to Hydra.
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
from typing_extensions import override

from depass_lightning.commands.shell import first_process, print_stderr
from depass_lightning.errors import DePassError
from depass_lightning.storage import OtherRunError
from depass_lightning.storage.manifest import NAME
from depass_lightning.utils.atomic_files import remove_halves

try:
    import fcntl
except ImportError:  # Windows: folders are not locked
    fcntl = None

UNFINISHED = ".unfinished"
PATIENCE = 5.0  # seconds to wait for a lock


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Lock a run's folder, with a marker file in it that is removed when the run succeeds.

    Raises:
        DePassError: another process has locked the folder.
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
        except OtherRunError:  # keep the other run's marker
            if before:
                _write(file, before)
            else:
                mark.unlink(missing_ok=True)
            raise
        mark.unlink(missing_ok=True)


class Resume(Callback):
    """Resume an interrupted command in its folder when the same command is started again.

    With `resume=false`, a run always gets a new folder, next to a chosen one that has results.
    """

    def __init__(self) -> None:
        self.mark: TextIO | None = None

    @override
    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        if not first_process():  # the first process passes its folder on
            return
        chosen = any(override.startswith("hydra.run.dir=") for override in config.hydra.overrides.hydra)
        folder = Path(config.hydra.run.dir)
        run_folder = _run_folder(config, folder, chosen)
        if run_folder != folder:
            with read_write(config), open_dict(config):
                config.hydra.run.dir = str(run_folder)

    @override
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if not first_process():
            return
        chosen = any(override.startswith("hydra.sweep.dir=") for override in config.hydra.overrides.hydra)
        folder = Path(config.hydra.sweep.dir)
        sweep_folder = _run_folder(config, folder, chosen)
        with read_write(config), open_dict(config):
            if sweep_folder != folder:
                config.hydra.sweep.dir = str(sweep_folder)
                # Each job's configuration is composed from the command line again.
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir={sweep_folder}")
        sweep_folder.mkdir(parents=True, exist_ok=True)
        self.mark = _hold(sweep_folder / UNFINISHED)
        if self.mark is None:  # Hydra turns exceptions of callbacks into warnings
            print_stderr(
                f"error: another sweep is at work in {sweep_folder}; wait for it, or give another folder "
                "(hydra.sweep.dir=...)",
                "red",
            )
            sys.exit(1)
        _write(self.mark, json.dumps(_overrides(config)))

    @override
    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if self.mark is not None:
            Path(self.mark.name).unlink(missing_ok=True)
            self.mark.close()


def _run_folder(config: DictConfig, folder: Path, chosen: bool) -> Path:
    """Return the folder to use: the one that the user chose, an unfinished one, or a new one."""
    if chosen:
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
            print_stderr(f"goes on with {mark.parent} (resume=false starts a new run)", "yellow")
            return mark.parent
    return folder


def _overrides(config: DictConfig) -> list[str]:
    """Return the command line's overrides, without those that cannot change the results."""
    overrides = map(str, [*config.hydra.overrides.task, *config.hydra.overrides.hydra])
    return sorted(
        override for override in overrides if not override.startswith(("hydra.mode=", "open=", "resume="))
    )


def _typed() -> list[str]:
    """Return the overrides of the current run."""
    if not HydraConfig.initialized():
        return []
    return _overrides(OmegaConf.create({"hydra": {"overrides": HydraConfig.get().overrides}}))


def _hold(mark: Path) -> TextIO | None:
    """Open a folder's marker file and lock it; return None if another process keeps the lock."""
    started = time.monotonic()
    while True:
        file = mark.open("a+")
        if _locked(file.fileno()) and _has_path(file.fileno(), mark):
            return file
        file.close()
        # The processes of a killed run take a moment to exit.
        if time.monotonic() - started >= PATIENCE:
            return None
        time.sleep(0.1)


def _has_path(file: int, path: Path) -> bool:
    """Return whether an open file still has its path: the previous owner of the lock may have removed it."""
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
    """Lock an open file until it is closed; return False if another process has locked it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system does not support locks
        return True
    return True


def _free(mark: Path) -> bool:
    """Return whether no process has locked a marker file."""
    try:
        with mark.open() as file:
            return _locked(file.fileno())
    except FileNotFoundError:  # the run has just ended
        return False
