"""Ends a run of `Trainer.predict` cleanly where one of its processes is told to stop, or is lost."""

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

TERMINATED = 128 + signal.SIGTERM  # a process's exit code, by custom
PAUSE = 0.5  # seconds between two looks at the other processes
PARENT = "DEPASS_PARENT"  # in the environment: the id of the process that Lightning starts others from


class Terminated(SystemExit):
    """The process was told to stop: by SIGTERM, which schedulers send before they take a node away."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


def stop_on_sigterm(before: Callable[[], None] = lambda: None) -> None:
    """Let SIGTERM end whatever is under way by `Terminated`, so that files are closed and handlers run.

    Args:
        before: is called first.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        before()
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def end_with_parent() -> None:
    """End this process, from now on, where the one that Lightning has started it from is gone.

    A process that Lightning has not started tells its id to those that will be: by the time that such a
    process can ask for its parent, the parent may be gone and another in its place.
    """
    global _bound
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        os.environ[PARENT] = str(os.getpid())
        return
    told = None if "TORCHELASTIC_RUN_ID" in os.environ else os.environ.get(PARENT)
    _end_with(int(told or os.getppid()), threading.Event())
    _bound = os.getpid()


class ProcessWatch(Callback):
    """Watch over the processes of a prediction.

    - SIGTERM ends every process at once. (Lightning's own handler sends a message to all processes by a
      collective, which hangs where only one of them is told to stop.)
    - A process that is lost is named, and the first process ends, instead of waiting for it forever.
    - A process whose parent is lost ends, instead of working on for nobody, or of waiting for another process
      that was never started.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._working = self._lost = False
        self._parent = os.getppid()
        _made.add(self)
        end_with_parent()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch: over the processes that this one started, or over the one that started it."""
        self._over = threading.Event()
        launcher = trainer.strategy.launcher
        children: list[Popen[bytes]] = getattr(launcher, "procs", [])
        children = [child for child in children if isinstance(child, Popen)]

        def end_children() -> None:
            for child in children:
                child.terminate()
            if self._lost:  # the signal is our own
                raise SystemExit(1)

        stop_on_sigterm(end_children)
        if children:
            _start(lambda: self._look_at(children), self._over)
        elif trainer.world_size > 1 and (trainer.global_rank > 0 or _started_by_another()):
            _end_with(self._parent, self._over)

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Remember that work has begun: what fails from here on may fail on one process alone."""
        self._working = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # The first process says what ended it; another has nobody who speaks for it.
        if self._working and trainer.global_rank > 0 and isinstance(exception, Exception):
            _say(f"error on process {trainer.global_rank + 1} of {trainer.world_size}: {exception}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._over.set()

    def _look_at(self, children: list[Popen[bytes]]) -> bool:
        """End the first process where one that it started has failed."""
        for number, child in enumerate(children, start=2):
            code = child.poll()
            if code:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                _say(f"error: process {number} of {len(children) + 1} was lost ({how})")
                self._lost = True
                os.kill(os.getpid(), signal.SIGTERM)
                return True
        return False


_made: WeakSet[ProcessWatch] = WeakSet()
_forking = 0  # the process that forks
_bound = 0  # a process that watches over its parent already


def _before_fork() -> None:
    global _forking
    _forking = os.getpid()


def _in_fork() -> None:
    """Watch over the parent at once: Lightning calls a callback only when all processes have met."""
    global _bound
    if _made:
        _end_with(_forking, threading.Event())
        _bound = os.getpid()


os.register_at_fork(before=_before_fork, after_in_child=_in_fork)


def _start(look: Callable[[], bool], over: threading.Event) -> None:
    """Look again and again, until it is over or a look says so."""

    def watch() -> None:
        while not (look() or over.wait(PAUSE)):
            pass

    threading.Thread(target=watch, daemon=True, name="process watch").start()


def _end_with(parent: int, over: threading.Event) -> None:
    """End this process where the one that started it is gone."""
    if os.getpid() == _bound:
        return

    def look() -> bool:
        if os.getppid() != parent:
            os._exit(1)  # the main thread may be deep in a computation, and nobody waits for it
        return False

    _start(look, over)


def _started_by_another() -> bool:
    """Whether this process, be it the first, has a parent that must not be lost."""
    return multiprocessing.parent_process() is not None or "TORCHELASTIC_RUN_ID" in os.environ


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
