"""Writes attributions to disk as `Trainer.predict` makes them."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from depass_lightning.errors import DePassError
from depass_lightning.modules.attribution import Predictions
from depass_lightning.storage import (
    ATTRIBUTION_SCHEMA,
    merge_shards,
    read_json_lines,
    write_json_lines,
    write_shard,
)


class AttributionWriter(Callback):
    """Write what `AttributionModule` predicts: Parquet shards as the run goes, one file when it ends.

    Every process writes shards of its own to `<folder>/attributions/shards`. At the end the first one
    merges them by index into `<folder>/attributions/attributions.parquet`, and lists the prompts that could
    not be attributed in `<folder>/skipped.jsonl`, which is there only if there are any. All processes must
    see the same folder.

    Rows carry their own index, so this is no `BasePredictionWriter`: the loader has no sampler to ask.

    Args:
        folder: the run's folder.
        flush_every: how many prompts a shard holds at least: what a killed process loses at most, and a
            batch.
        expected: how many prompts must be accounted for at the end; not checked where None.
        rows: how many rows a prompt has at most; its first has the index of the prompt times this.
        skipped: what was skipped before the run, with the reason: it is listed with the rest.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        flush_every: int = 64,
        expected: int | None = None,
        rows: int = 1,
        skipped: list[dict[str, Any]] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.flush_every = flush_every
        self.expected = expected
        self.rows = rows
        self.skipped_before = list(skipped or [])
        self._rows: list[dict[str, Any]] = []
        self._skipped: list[dict[str, Any]] = []
        self._written = 0

    @property
    def path(self) -> Path:
        """The file that holds every attribution at the end."""
        return self.folder / "attributions" / "attributions.parquet"

    @property
    def skipped_path(self) -> Path:
        """The file that lists the prompts that were skipped, if there are any."""
        return self.folder / "skipped.jsonl"

    @property
    def _shards(self) -> Path:
        return self.path.parent / "shards"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._rows, self._skipped, self._written = [], [], 0
        if trainer.is_global_zero:  # an earlier run in this folder must not mix with this one
            shutil.rmtree(self._shards, ignore_errors=True)
            self.skipped_path.unlink(missing_ok=True)
        trainer.strategy.barrier("attribution writer: folder is clear")

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
        self._rows += outputs.rows
        self._skipped += outputs.skipped
        if len(self._rows) >= self.flush_every:
            self._flush(trainer.global_rank)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer.global_rank)
        if self._skipped:
            write_json_lines(self._shards / f"rank{trainer.global_rank:04d}.skipped.jsonl", self._skipped)
        trainer.strategy.barrier("attribution writer: shards are written")
        if trainer.is_global_zero:
            self._merge(whole=trainer.limit_predict_batches == 1.0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._flush(trainer.global_rank)  # what is done is kept

    def _flush(self, rank: int) -> None:
        if self._rows:
            shard = self._shards / f"rank{rank:04d}-{self._written:06d}.parquet"
            write_shard(shard, self._rows, ATTRIBUTION_SCHEMA)
            self._written += 1
            self._rows = []

    def _merge(self, whole: bool) -> None:
        """Make one file of the shards of all processes, and one of what they skipped."""
        skipped = [row for path in self._shards.glob("*.skipped.jsonl") for row in read_json_lines(path)]
        skipped.sort(key=lambda row: row["index"])
        expected = None
        if whole and self.expected is not None:
            done = set(range(self.expected)) - {row["index"] for row in skipped}
            expected = {index * self.rows for index in done}
        shards = sorted(self._shards.glob("*.parquet"))
        if shards or expected:
            merge_shards(shards, self.path, expected=expected)
        else:
            write_shard(self.path, [], ATTRIBUTION_SCHEMA)
        if everything := [*self.skipped_before, *skipped]:
            write_json_lines(self.skipped_path, everything)
        shutil.rmtree(self._shards, ignore_errors=True)
