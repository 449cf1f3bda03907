"""Writes attributions to disk as `Trainer.predict` makes them."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from depass_lightning.errors import DePassError
from depass_lightning.modules.attribution_module import Predictions
from depass_lightning.storage import RunStore

POLL_SECONDS = 0.02  # between two checks whether the other processes are done


class AttributionWriter(Callback):
    """Write the predictions of `AttributionModule`: one Parquet shard per batch, merged when the run ends.

    Every process writes its shards to `<folder>/attributions/shards`. At the end the first one merges them by
    index into `<folder>/attributions/attributions.parquet`, and lists the prompts that could not be
    attributed, if any, in `<folder>/skipped.jsonl`. Components' states, if the module keeps them, are
    `<folder>/attributions/states/<index>.safetensors`. All processes must share the folder.

    A process that is killed loses only the current batch: `PromptData(done=lambda: writer.done)` leaves out
    the prompts in the folder, the same ones on every process. The caller checks by
    `depass_lightning.storage.keep_manifest` that they belong to the same run.

    This is not a `BasePredictionWriter`, because rows contain their index: the loader has no sampler.

    Args:
        folder: the run's folder.
        resume: keep the folder's contents and add to them; False removes them.
        expected: the number of prompts that must be accounted for at the end; None checks nothing.
        rows: the maximum number of rows per prompt; its first has the index of the prompt times this.
        skipped: rows that were skipped before the run, with the reason; they are listed with the rest.
        together: all processes work on the same prompts, and the first one writes.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resume: bool = False,
        expected: int | None = None,
        rows: int = 1,
        skipped: Sequence[dict[str, Any]] = (),
        together: bool = False,
    ) -> None:
        self.run_store = RunStore(folder, rows)
        self.resume = resume
        self.expected = expected
        self.skipped = list(skipped)
        self.together = together
        self.done: set[int] | None = None

    def tidy(self) -> list[Path]:
        """Remove an earlier run's unfinished or damaged files, and store the prompts that are done in `done`.

        Returns:
            The files that were damaged or missing.
        """
        damaged = self.run_store.tidy()
        self.done = self.run_store.done()
        return damaged

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            if not self.resume:
                self.run_store.clear()
                self.done = set()
            elif self.done is None:
                self.tidy()
        # The first process decides: one that looked later would see what another has just added.
        self.done = trainer.strategy.broadcast(self.done)

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
        if not isinstance(outputs, Predictions):
            raise DePassError(
                f"AttributionWriter needs an AttributionModule's predictions, not a {type(outputs).__name__}"
            )
        if trainer.is_global_zero or not self.together:
            self.run_store.add(trainer.global_rank, outputs.rows, outputs.skipped, len(batch), outputs.states)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run_store.end(trainer.global_rank)
        if not trainer.is_global_zero:
            return
        while self.run_store.ended() < trainer.world_size:
            time.sleep(POLL_SECONDS)
        whole = self.expected is not None and trainer.limit_predict_batches == 1.0
        self.run_store.merge(range(self.expected or 0) if whole else None, self.skipped)
