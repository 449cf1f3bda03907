"""Writes attributions to disk as `Trainer.predict` makes them."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from depass_lightning.errors import DePassError
from depass_lightning.modules.attribution_module import Predictions
from depass_lightning.storage import RunStore

WAIT = 0.02  # seconds between two looks at whether the other processes are done


class AttributionWriter(Callback):
    """Write what `AttributionModule` predicts: a Parquet shard a batch as the run goes, one file at its end.

    Every process writes shards of its own to `<folder>/attributions/shards`. At the end the first one
    merges them by index into `<folder>/attributions/attributions.parquet`, and lists the prompts that could
    not be attributed in `<folder>/skipped.jsonl`, which is there only if there are any. Components' states,
    where the module gives them, are `<folder>/attributions/states/<index>.safetensors`. All processes must
    see the same folder.

    A process that is killed loses the batch in flight and no other: `PromptData(done=lambda: writer.done)`
    leaves out what is in the folder, the same prompts on every process. Whether that belongs to the same run
    is for the caller to check, by `depass_lightning.storage.keep_manifest`.

    Rows carry their own index, so this is no `BasePredictionWriter`: the loader has no sampler to ask.

    Args:
        folder: the run's folder.
        resume: keep what is in the folder, and add to it; what is there is removed where False.
        expected: how many prompts must be accounted for at the end; not checked where None.
        rows: how many rows a prompt has at most; its first has the index of the prompt times this.
        skipped: what was skipped before the run, with the reason: it is listed with the rest.
        together: all processes work on the same prompts: the first one writes.
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
        """Remove what an earlier run left half done or damaged, and note in `done` the prompts that are done.

        Returns:
            The files that were damaged or missing.
        """
        damaged = self.run_store.tidy()
        self.done = self.run_store.done()
        return damaged

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            if not self.resume:
                self.run_store.clear()
                self.done = set()
            elif self.done is None:
                self.tidy()
        # The first process says what is done: one that looked later would find what another has just added.
        self.done = trainer.strategy.broadcast(self.done)

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
                f"AttributionWriter writes what AttributionModule predicts, not a {type(outputs).__name__}"
            )
        if trainer.is_global_zero or not self.together:
            self.run_store.add(trainer.global_rank, outputs.rows, outputs.skipped, len(batch), outputs.states)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run_store.end(trainer.global_rank)
        if not trainer.is_global_zero:
            return
        while self.run_store.ended() < trainer.world_size:
            time.sleep(WAIT)
        whole = self.expected is not None and trainer.limit_predict_batches == 1.0
        self.run_store.merge(range(self.expected or 0) if whole else None, self.skipped)
