"""Whether a checkpoint is about to be ranked by one of the probes' scalars."""

import time
from typing import Any

from lightning.pytorch import Trainer

PREFIX = "depass/"


def ranks_after_batch(trainer: Trainer) -> bool:
    """Whether a ModelCheckpoint that reads a probe's scalar saves after this batch; the same on all ranks.

    It ranks first and calls `on_save_checkpoint` afterwards, so the scalar has to be current before.

    Args:
        trainer: the trainer, whose checkpoint callbacks run after all others.
    """
    reading = [callback for callback in trainer.checkpoint_callbacks if _reads(callback)]
    steps = [getattr(callback, "_every_n_train_steps", None) for callback in reading]
    if any(every and trainer.global_step % every == 0 for every in steps):
        return True
    timed = [callback for callback in reading if getattr(callback, "_train_time_interval", None) is not None]
    # ranks have different clocks
    return bool(timed) and trainer.strategy.broadcast(any(map(_is_time, timed)))


def ranks_after_epoch(trainer: Trainer) -> bool:
    """Whether a ModelCheckpoint that reads a probe's scalar may save at the end of this epoch.

    Args:
        trainer: the trainer.
    """
    reading = [callback for callback in trainer.checkpoint_callbacks if _reads(callback)]
    epochs = [getattr(callback, "_every_n_epochs", None) for callback in reading]
    return any(every and (trainer.current_epoch + 1) % every == 0 for every in epochs)


def _reads(callback: Any) -> bool:
    """Whether a checkpoint callback ranks by a probe's scalar, or has one in its file names."""
    texts = (getattr(callback, "monitor", None), getattr(callback, "filename", None))
    return any(PREFIX in text for text in texts if text)


def _is_time(callback: Any) -> bool:
    last = callback._last_time_checked
    return last is not None and time.monotonic() - last >= callback._train_time_interval.total_seconds()
