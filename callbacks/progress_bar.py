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
from typing_extensions import override

from depass_lightning.callbacks.prediction_writer import AttributionWriter
from depass_lightning.modules.prompt_datamodule import PromptBatches
from depass_lightning.storage import RunStore

log = logging.getLogger("depass_lightning")

POLL_SECONDS = 0.5  # between two checks of the other processes' progress


class AttributionProgress(ProgressBar):
    """Show the number of attributed prompts, the rate, and the remaining time.

    One bar counts the prompts of all processes, from the folder that an `AttributionWriter` of the same
    trainer writes to. Without a writer it counts those of the first process, as its title states.

    Args:
        console: where to show the bar; None for standard error, which keeps standard output clean.
        log_every: the number of seconds after which every process logs its progress (to the logger
            `depass_lightning`); None logs nothing.
    """

    def __init__(self, console: Console | None = None, *, log_every: float | None = None) -> None:
        super().__init__()
        self.log_every = log_every
        self._console = console
        self._enabled = True
        self._bar: Progress | None = None
        self._over = threading.Event()
        self._attributed = self._share = 0
        self._started = self._logged = 0.0

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = trainer.predict_dataloaders
        planned = loader if isinstance(loader, PromptBatches) else None
        self._attributed, self._share = 0, planned.share if planned else 0
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

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._attributed += len(batch)
        if self._bar is not None and (trainer.world_size == 1 or _run_store(trainer) is None):
            self._bar.advance(self._bar.task_ids[0], len(batch))
        now = time.monotonic()
        if self.log_every is not None and now - self._logged >= self.log_every:
            self._logged = now
            log.info(
                "process %d of %d: %d of %d prompts, %.1f prompts/s",
                trainer.global_rank + 1,
                trainer.world_size,
                self._attributed,
                self._share,
                self._attributed / (now - self._started),
            )

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:  # the writer runs first, and has waited for all processes
            self._bar.update(self._bar.task_ids[0], completed=self._bar.tasks[0].total or self._attributed)
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _follow(self, run_store: RunStore, bar: Progress, over: threading.Event) -> None:
        """Update the bar from all processes' progress until the run is over."""
        before = run_store.counted()  # by an earlier run

        def follow() -> None:
            while not over.wait(POLL_SECONDS):
                # Merged shards are removed: the bar never goes back.
                done = max(run_store.counted() - before, int(bar.tasks[0].completed))
                bar.update(bar.task_ids[0], completed=done)

        threading.Thread(target=follow, daemon=True, name="progress").start()

    def _stop(self) -> None:
        self._over.set()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _run_store(trainer: Trainer) -> RunStore | None:
    """Return where the run's results are counted, if a writer is among the callbacks."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    writers = (callback for callback in callbacks if isinstance(callback, AttributionWriter))
    return next((writer.run_store for writer in writers), None)


class _Rate(ProgressColumn):
    """Prompts per second."""

    @override
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.{0 if speed >= 10 else 1}f} prompts/s", style="cyan")
