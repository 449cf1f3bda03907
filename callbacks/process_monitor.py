"""Ends a run of `Trainer.predict` cleanly when one of its processes is terminated or lost."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from subprocess import Popen
from types import FrameType
from typing import Any
from weakref import WeakSet

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

TERMINATED = 128 + signal.SIGTERM  # the conventional exit code
POLL_SECONDS = 0.5  # between two checks of the other processes
PARENT = "DEPASS_PARENT"  # the environment variable with the id of the process that starts the others


class Terminated(SystemExit):
    """The process received SIGTERM, which schedulers send before they take a node away."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


def stop_on_sigterm(before: Callable[[], None] = lambda: None) -> None:
    """Make SIGTERM raise `Terminated`, so that files are closed and handlers run.

    Args:
        before: called before `Terminated` is raised.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        before()
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def end_with_parent() -> None:
    """End this process as soon as the process that started it is gone.

    The first process puts its id into the environment of those that it starts: by the time that such a
    process asks for its parent, the parent may be gone and another process in its place.
    """
    global _bound
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        os.environ[PARENT] = str(os.getpid())
        return
    parent = None if "TORCHELASTIC_RUN_ID" in os.environ else os.environ.get(PARENT)
    _end_with(int(parent or os.getppid()), threading.Event())
    _bound = os.getpid()


class ProcessMonitor(Callback):
    """Monitor the processes of a prediction.

    - SIGTERM ends every process at once. (Lightning's handler uses a collective, which hangs where only one
      process receives the signal.)
    - A lost process is reported, and the first process ends, instead of waiting for it forever.
    - A process whose parent is lost ends, instead of working on, or of waiting for a process that was never
      started.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._working = self._lost = False
        self._parent = os.getppid()
        _made.add(self)
        end_with_parent()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to monitor the processes that this one started, or the one that started it."""
        self._over = threading.Event()
        launcher = trainer.strategy.launcher
        children: list[Popen[bytes]] = getattr(launcher, "procs", [])
        children = [child for child in children if isinstance(child, Popen)]

        def end_children() -> None:
            for child in children:
                child.terminate()
            if self._lost:  # this process sent the signal
                raise SystemExit(1)

        stop_on_sigterm(end_children)
        if children:
            _poll(lambda: self._check(children), self._over)
        elif trainer.world_size > 1 and (trainer.global_rank > 0 or _started_by_another()):
            _end_with(self._parent, self._over)

    @override
    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note that work has begun: from now on an error may occur on one process alone."""
        self._working = True

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # The command reports the first process's error, and no other's.
        if self._working and trainer.global_rank > 0 and isinstance(exception, Exception):
            _print_stderr(f"error on process {trainer.global_rank + 1} of {trainer.world_size}: {exception}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._over.set()

    def _check(self, children: list[Popen[bytes]]) -> bool:
        """End the first process where one that it started has failed."""
        for number, child in enumerate(children, start=2):
            code = child.poll()
            if code:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                _print_stderr(f"error: process {number} of {len(children) + 1} was lost ({how})")
                self._lost = True
                os.kill(os.getpid(), signal.SIGTERM)
                return True
        return False


_made: WeakSet[ProcessMonitor] = WeakSet()
_forking = 0  # the process that forks
_bound = 0  # the process that already monitors its parent


def _before_fork() -> None:
    global _forking
    _forking = os.getpid()


def _in_fork() -> None:
    """Monitor the parent at once: Lightning calls a callback only when all processes are ready."""
    global _bound
    if _made:
        _end_with(_forking, threading.Event())
        _bound = os.getpid()


os.register_at_fork(before=_before_fork, after_in_child=_in_fork)


def _poll(check: Callable[[], bool], over: threading.Event) -> None:
    """Call `check` in a thread until it returns True or `over` is set."""

    def poll() -> None:
        while not (check() or over.wait(POLL_SECONDS)):
            pass

    threading.Thread(target=poll, daemon=True, name="process monitor").start()


def _end_with(parent: int, over: threading.Event) -> None:
    """End this process when the process that started it is gone."""
    if os.getpid() == _bound:
        return

    def check() -> bool:
        if os.getppid() != parent:
            os._exit(1)  # the main thread may be in the middle of a computation
        return False

    _poll(check, over)


def _started_by_another() -> bool:
    """Whether another process started this one, even if it is the first."""
    return multiprocessing.parent_process() is not None or "TORCHELASTIC_RUN_ID" in os.environ


def _print_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
