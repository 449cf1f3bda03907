"""Run a script as a process of its own without its imports: forked from the tests, which have made them."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.multiprocessing as multiprocessing

# What the scripts import takes most of a short run's time: a fork has it already.
import depass_lightning.commands.analyze
import depass_lightning.commands.train  # noqa: F401


def start_script(script: Path, arguments: list[str], folder: Path) -> Script:
    """Start a Python script in a folder, as `python script arguments` does there.

    Args:
        script: the script.
        arguments: its arguments.
        folder: where it runs; what it prints is kept in files next to it.
    """
    output, errors = (folder.parent / f"{folder.name}.{kind}" for kind in ("out", "err"))
    process = multiprocessing.get_context("fork").Process(
        target=_run, args=(script, arguments, folder, output, errors)
    )
    process.start()
    return Script(process, [str(script), *arguments], output, errors)


def run_script(script: Path, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a Python script in a folder to its end; for the arguments see `start_script`."""
    return start_script(script, arguments, folder).wait()


@dataclass
class Script:
    """A script that runs."""

    process: BaseProcess
    command: list[str]
    output: Path
    errors: Path

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end; a script that was killed has the negative signal as its return code."""
        self.process.join(500)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"{' '.join(self.command)} has run for 500 seconds")
        assert self.process.exitcode is not None
        printed = [path.read_text("utf-8") for path in (self.output, self.errors)]
        return subprocess.CompletedProcess(self.command, self.process.exitcode, *printed)


def _run(script: Path, arguments: list[str], folder: Path, output: Path, errors: Path) -> None:
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
    os.environ["PYTHONPATH"] = str(script.parent)  # of the processes that it starts itself
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    code: object = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
