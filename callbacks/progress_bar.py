"""A progress bar that counts the prompts of all processes."""

import logging
import threading
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from depass_lightning.callbacks.prediction_writer import AttributionWriter
from depass_lightning.modules.prompt_datamodule import PromptBatches
from depass_lightning.storage import RunStore

log = logging.getLogger("depass_lightning")

LOOK = 0.5  # seconds between two looks at what the other processes have done


class AttributionProgress(ProgressBar):
    """Show how many prompts are attributed, how many a second, and how long it will take.

    One bar counts the prompts of all processes, which it sees in the folder that an `AttributionWriter`
    beside it writes to; without one it counts those of the first process, and says so.

    Args:
        console: where to show it; the standard error where None, so that what a program prints stays clean.
        log_every: after so many seconds every process writes a line with its own progress into the log (of
            the logger `depass_lightning`); None writes none.
    """

    def __init__(self, console: Console | None = None, *, log_every: float | None = None) -> None:
        super().__init__()
        self.log_every = log_every
        self._console = console
        self._enabled = True
        self._bar: Progress | None = None
        self._over = threading.Event()
        self._own = self._share = 0
        self._started = self._logged = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = trainer.predict_dataloaders
        planned = loader if isinstance(loader, PromptBatches) else None
        self._own, self._share = 0, planned.share if planned else 0
        self._started = self._logged = time.monotonic()
        if not (self._enabled and trainer.is_global_zero):
            return
        run_store = _run_store(trainer)
        alone = trainer.world_size == 1
        title = "Attributing prompts"
        if run_store is None and not alone:
            title = f"{title} (process 1 of {trainer.world_size})"
        whole = alone or run_store is not None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console or Console(stderr=True),
        )
        self._bar.add_task(title, total=(planned.prompts if planned and whole else self._share) or None)
        self._bar.start()
        if run_store is not None and not alone:
            self._over = threading.Event()
            self._follow(run_store, self._bar, self._over)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._own += len(batch)
        if self._bar is not None and (trainer.world_size == 1 or _run_store(trainer) is None):
            self._bar.advance(self._bar.task_ids[0], len(batch))
        now = time.monotonic()
        if self.log_every is not None and now - self._logged >= self.log_every:
            self._logged = now
            log.info(
                "process %d of %d: %d of %d prompts, %.1f prompts/s",
                trainer.global_rank + 1,
                trainer.world_size,
                self._own,
                self._share,
                self._own / (now - self._started),
            )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:  # the writer, which comes first, has waited for all processes
            self._bar.update(self._bar.task_ids[0], completed=self._bar.tasks[0].total or self._own)
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _follow(self, run_store: RunStore, bar: Progress, over: threading.Event) -> None:
        """Count what all processes have done, now and then, until the run is over."""
        before = run_store.counted()  # by an earlier run

        def follow() -> None:
            while not over.wait(LOOK):
                # Once they are merged the shards are gone: the bar never goes back.
                done = max(run_store.counted() - before, int(bar.tasks[0].completed))
                bar.update(bar.task_ids[0], completed=done)

        threading.Thread(target=follow, daemon=True, name="progress").start()

    def _stop(self) -> None:
        self._over.set()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _run_store(trainer: Trainer) -> RunStore | None:
    """Return where the run's results are counted, if anything writes them."""
    writers = (own for own in trainer.callbacks if isinstance(own, AttributionWriter))  # type: ignore[attr-defined]
    return next((writer.run_store for writer in writers), None)


class _Rate(ProgressColumn):
    """Prompts a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.{0 if speed >= 10 else 1}f} prompts/s", style="cyan")
