"""A progress bar that counts prompts."""

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

from depass_lightning.modules.prompts import PromptBatches


class AttributionProgress(ProgressBar):
    """Show how many prompts are attributed, how many a second, and how long it will take.

    The first process shows its own share, and says so where there are several.

    Args:
        console: where to show it; the standard error where None, so that what a program prints stays clean.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console
        self._enabled = True
        self._bar: Progress | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self._enabled and trainer.is_global_zero):
            return
        loader = trainer.predict_dataloaders
        total = loader.prompts if isinstance(loader, PromptBatches) else None
        share = f" (process 1 of {trainer.world_size})" if trainer.world_size > 1 else ""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console or Console(stderr=True),
        )
        self._bar.add_task(f"Attributing prompts{share}", total=total)
        self._bar.start()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], len(batch))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Rate(ProgressColumn):
    """Prompts a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.{0 if speed >= 10 else 1}f} prompts/s", style="cyan")
