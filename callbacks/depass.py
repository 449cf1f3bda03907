"""DePassCallback: what a model in training relies on, at every validation and checkpoint.

The hooks decide when `monitoring/monitor.py` runs the probes. Scalars are logged where ModelCheckpoint and
EarlyStopping read them, and to the loggers; rank zero publishes the maps.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from depass_lightning.attribution.automatic_rule import AUTO
from depass_lightning.errors import DePassError
from depass_lightning.models.sharding import WAY_OUT
from depass_lightning.monitoring.checkpoints import ranks_after_batch, ranks_after_epoch
from depass_lightning.monitoring.discovery import ModelFinder
from depass_lightning.monitoring.history import History
from depass_lightning.monitoring.monitor import MonitorOptions, MonitorResult, ProbeMonitor
from depass_lightning.monitoring.probe_sets import ProbeSource
from depass_lightning.monitoring.sinks import is_named, sinks_of

SHARDED = ("FSDPStrategy",)  # others are refused by the type of their parameters


class DePassCallback(Callback):
    """Attributes held-out probes while a model trains, and logs what changes.

    It runs when training starts and ends, at every validation, and whenever a checkpoint is written, but
    never twice at one optimiser step. With `trainer.validate` it runs once, and does not change the history.

    Args:
        probes: a task, a file, a DataLoader, a list, or a mapping from names to these; see `ProbeMonitor`.
        tokenizer: the model's tokenizer; None for the `tokenizer` of the LightningModule or the data module,
            or the one that the model's name loads.
        model: where the language model is: the path of an attribute of the LightningModule, or a function of
            the LightningModule. None searches for it.
        every_n_steps: also run after every this many optimiser steps.
        folder: where pages and scores are written, in a folder `depass`; None for the first logger's folder,
            or the trainer's `default_root_dir` without a logger.
        options: `size`, `source`, `target`, `answer`, `max_overhead`, `faithfulness`, `circuit`,
            `batch_size`, `on_error`, `alarms`, `control`, `scalars`, and the rule's settings, as for
            `ProbeMonitor`.

    Raises:
        DePassError: an argument is invalid; when training starts, the probes, the model or the tokenizer
            cannot be found, or weights are sharded other than by FSDP2.
    """

    def __init__(
        self,
        probes: ProbeSource | Mapping[str, ProbeSource] = "ioi",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        model: ModelFinder | None = None,
        every_n_steps: int | None = None,
        folder: str | Path | None = None,
        **options: Unpack[MonitorOptions],
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise DePassError(f"every_n_steps must be at least 1, not {every_n_steps}")
        self.monitor = ProbeMonitor(None, None, probes, **options)
        self.tokenizer = tokenizer
        self.model = model
        self.every_n_steps = every_n_steps
        self.folder = folder
        self._interrupted = False

    @property
    def history(self) -> dict[str, History]:
        """The runs so far, by probe set, or by set and source where there are several sources."""
        return self.monitor.history

    @property
    @override
    def state_key(self) -> str:
        """The key of the state in a checkpoint: the probe sets, and settings other than the defaults."""
        defaults = {
            "rule": AUTO,
            "attention_path": "content",
            "source": ["tokens"],
            "target": "contrast",
        }
        monitor = self.monitor
        settings = {"source": list(monitor.sources), "target": monitor.target, **monitor.settings}
        unusual = {
            name: settings[name] for name in defaults if settings.get(name, defaults[name]) != defaults[name]
        }
        return self._generate_state_key(probes=sorted(monitor.probes), **unusual)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the last run's step and scalars and the history, as plain containers and tensors."""
        return self.monitor.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint: its curves and similarities."""
        self.monitor.load_state_dict(state_dict)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the probes, so that a mistake in them is found before anything expensive."""
        self._interrupted = False
        if is_named(trainer.strategy, *SHARDED):
            raise DePassError(
                f"{type(trainer.strategy).__name__} shards the model's weights over ranks, but "
                f"DePassCallback needs all of them on every rank; {WAY_OUT}"
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        others = [other for other in callbacks if other is not self and isinstance(other, DePassCallback)]
        if both := sorted(
            {name for other in others for name in other.monitor.probes} & self.monitor.probes.keys()
        ):
            raise DePassError(
                f"two DePassCallbacks have a probe set called {both[0]!r}, and write to the same files; "
                f"give it another name in one of them: probes={{'{both[0]}_2': ...}}"
            )
        if stage in ("fit", "validate"):
            self.monitor.load()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the model, now that it is on its device, before the first batch."""
        self._find(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the model where `trainer.validate` runs alone."""
        self._find(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run once before training: the first reference."""
        self.monitor.start(trainer.global_step)
        self._run_and_log(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run at every `every_n_steps`-th step, and before a checkpoint is ranked by a probe's scalar."""
        scheduled = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if (scheduled or ranks_after_batch(trainer)) and self._due(trainer):
            self._run_and_log(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run before a checkpoint is ranked by a probe's scalar at the end of an epoch without validation."""
        if ranks_after_epoch(trainer) and self._due(trainer):
            self._run_and_log(trainer)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run with the validation, and log the scalars with the validation's."""
        if trainer.sanity_checking:
            return
        result = self._run(trainer) if self._due(trainer) else None
        if result is None or not result.new:
            _expose(trainer, self.monitor.scalars)
            return
        for name, value in result.scalars.items():
            # the ranks agree already, but Lightning warns unless it may synchronise
            pl_module.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        self._publish(trainer, replace(result, scalars={}))

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Run for the checkpoint that is being written, and include the run in it."""
        if self.monitor.bound and not self._interrupted and trainer.state.fn == TrainerFn.FITTING:
            if self._due(trainer):
                self._run_and_log(trainer)
            else:
                _expose(trainer, self.monitor.scalars)
            # Lightning collected the callbacks' states before it called this
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run on the weights that training ends with."""
        self._run_and_log(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Run no more: other ranks may be gone, and nothing could be gathered."""
        self._interrupted = True

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the model."""
        self.monitor.release()

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.monitor.bound:
            datamodule = getattr(trainer, "datamodule", None)
            holders = (pl_module, datamodule)
            self.monitor.bind(
                pl_module,
                [self.tokenizer, *(getattr(holder, "tokenizer", None) for holder in holders)],
                where=self.model,
                trained=[
                    parameter
                    for optimizer in trainer.optimizers
                    for group in optimizer.param_groups
                    for parameter in group["params"]
                ],
            )

    def _due(self, trainer: Trainer) -> bool:
        """Whether there is time for a run; there always is outside of training."""
        return trainer.state.fn != TrainerFn.FITTING or self.monitor.due(trainer.global_step)

    def _run_and_log(self, trainer: Trainer) -> None:
        """Run outside of a validation, where Lightning's own logging would wait for it or refuse."""
        result = self._run(trainer)
        _expose(trainer, result.scalars)
        self._publish(trainer, result)
        for logger in trainer.loggers if result.new else ():
            logger.save()

    def _run(self, trainer: Trainer) -> MonitorResult:
        """Run every probe set, on all ranks together; once at an optimiser step."""
        if not self.monitor.bound:  # training ends before it has started
            return MonitorResult(trainer.global_step, self.monitor.scalars, new=False)
        result = self.monitor.run(trainer.global_step, record=trainer.state.fn == TrainerFn.FITTING)
        if result.stop:
            trainer.should_stop = True
        return result

    def _publish(self, trainer: Trainer, result: MonitorResult) -> None:
        """Write the maps and pass everything to the loggers, on rank zero."""
        logs = trainer.log_dir  # on every rank: Lightning broadcasts it
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False) or not result.new:
            return
        folder = self.folder or logs or trainer.default_root_dir
        self.monitor.publish(result, sinks_of(trainer.loggers), folder, _logged_step(trainer))


def _expose(trainer: Trainer, scalars: Mapping[str, float]) -> None:
    """Put scalars where ModelCheckpoint and EarlyStopping read them."""
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})


def _logged_step(trainer: Trainer) -> int:
    """Return the step that Lightning logs under, so that curves align with the loss.

    It differs from `global_step` where several optimisers step on one batch.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped
