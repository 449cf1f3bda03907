"""DePassTrainerCallback: `DePassCallback` for `transformers.Trainer` and what is built on it, such as TRL."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from typing_extensions import override

from depass_lightning.errors import DePassError
from depass_lightning.monitoring.discovery import ModelFinder
from depass_lightning.monitoring.history import History
from depass_lightning.monitoring.monitor import MonitorOptions, ProbeMonitor
from depass_lightning.monitoring.probe_sets import ProbeSource
from depass_lightning.monitoring.sinks import MLflowSink, Sink, TensorBoardSink, WandbSink
from depass_lightning.utils.atomic_files import whole_file
from depass_lightning.utils.distributed import from_first, sharing

HISTORY = "depass.pt"  # in a checkpoint's folder


class DePassTrainerCallback(TrainerCallback):
    """Attributes held-out probes while a `transformers.Trainer` trains, and logs what changes.

    It runs when training starts and ends, and at every evaluation and checkpoint; never twice at one step.
    The scalars are added to the evaluation's metrics with the prefix `eval_`, so that
    `metric_for_best_model="depass/ioi/on_target"` and callbacks that follow this one read them; to
    `state.log_history`; and to the services of `report_to`, over the Trainer's step.

    Args:
        probes: see `ProbeMonitor`.
        tokenizer: the model's tokenizer; None for the Trainer's `processing_class`, or the one that the
            model's name loads.
        model: where the language model is: the path of an attribute of the Trainer's model, or a function of
            it. None searches for it.
        every_n_steps: also run after every this many optimiser steps.
        folder: where pages and scores are written, in a folder `depass`; None for `output_dir`.
        sinks: where runs are logged; None for what `report_to` names, of W&B, TensorBoard and MLflow.
        options: `size`, `source`, `target`, `answer`, `max_overhead`, `faithfulness`, `circuit`,
            `batch_size`, `on_error`, `alarms`, `control`, `scalars`, and the rule's settings, as for
            `ProbeMonitor`.

    Raises:
        DePassError: an argument is invalid; when training starts, the probes, the model or the tokenizer
            cannot be found.
    """

    def __init__(
        self,
        probes: ProbeSource | Mapping[str, ProbeSource] = "ioi",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        model: ModelFinder | None = None,
        every_n_steps: int | None = None,
        folder: str | Path | None = None,
        sinks: Sequence[Sink] | None = None,
        **options: Unpack[MonitorOptions],
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise DePassError(f"every_n_steps must be at least 1, not {every_n_steps}")
        self.monitor = ProbeMonitor(None, None, probes, **options)
        self.tokenizer = tokenizer
        self.model = model
        self.every_n_steps = every_n_steps
        self.folder = folder
        self.sinks = sinks
        self._opened: list[Sink] | None = None

    @property
    def history(self) -> dict[str, History]:
        """The runs so far, by probe set, or by set and source where there are several sources."""
        return self.monitor.history

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Find the model, continue the checkpoint's history, and run once: the first reference."""
        self._bind(objects)
        if state.global_step > 0:
            self._resume(args, state.global_step)
        self._opened = None
        self.monitor.start(state.global_step)
        self._run(args, state, control)

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Run at every `every_n_steps`-th step, and at the last one before the Trainer's summary."""
        scheduled = self.every_n_steps and state.global_step % self.every_n_steps == 0
        if control.should_training_stop or (scheduled and self.monitor.due(state.global_step)):
            self._run(args, state, control)

    @override
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Run with the evaluation, and add the scalars to its metrics."""
        metrics = objects.get("metrics")
        if self.monitor.bound:
            if self.monitor.due(state.global_step):
                self._run(args, state, control)
            scalars = self.monitor.scalars
        else:
            self._bind(objects)
            scalars = dict(self.monitor.run(state.global_step, record=False).scalars)
            self.monitor.release()
        if metrics is not None:
            metrics.update({f"eval_{name}": value for name, value in scalars.items()})

    @override
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Run for the checkpoint that has been written, and write the history into its folder."""
        if not self.monitor.bound:
            return
        if self.monitor.due(state.global_step):
            self._run(args, state, control)
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            with whole_file(folder / HISTORY) as path:
                torch.save(self.monitor.state_dict(), path)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Run on the weights that training ends with, if their step had no run, and release the model."""
        self._run(args, state, control)
        self.monitor.release()

    def _bind(self, objects: Mapping[str, Any]) -> None:
        optimizer = objects.get("optimizer")
        groups = [] if optimizer is None else optimizer.param_groups
        self.monitor.bind(
            objects["model"],
            [self.tokenizer, objects.get("processing_class")],
            where=self.model,
            trained=[parameter for group in groups for parameter in group["params"]],
        )

    def _resume(self, args: TrainingArguments, step: int) -> None:
        """Load the history of the checkpoint that training goes on from, on the first rank for all."""
        paths = [_output(args) / f"{PREFIX_CHECKPOINT_DIR}-{step}" / HISTORY]
        if isinstance(args.resume_from_checkpoint, str):
            paths.insert(0, Path(args.resume_from_checkpoint) / HISTORY)

        def read() -> Any:
            path = next((path for path in paths if path.is_file()), None)
            return path and torch.load(path, map_location="cpu", weights_only=True)

        with sharing():
            saved = from_first(read)
        if saved:
            self.monitor.load_state_dict(saved)

    def _run(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        result = self.monitor.run(state.global_step)
        if not result.new:
            return
        if result.stop:
            control.should_training_stop = True
        state.log_history.append({**result.scalars, "epoch": state.epoch, "step": state.global_step})
        if self._opened is None:
            self._opened = _sinks(args) if state.is_world_process_zero and self.sinks is None else []
        self.monitor.publish(result, self.sinks or self._opened, self.folder or _output(args))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint of this step; a trial of a search has a folder of its own."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    trial = _output(args) / (state.trial_name or "") / name
    return trial if trial.is_dir() else _output(args) / name


def _output(args: TrainingArguments) -> Path:
    return Path(args.output_dir or "trainer_output")  # the Trainer's default


def _sinks(args: TrainingArguments) -> list[Sink]:
    """Return sinks for the services that the Trainer reports to."""
    services, sinks = args.report_to or [], list[Sink]()
    if "wandb" in services:
        import wandb

        if wandb.run is not None:
            sinks.append(WandbSink(wandb.run, axis="train/global_step"))
    if "tensorboard" in services:
        from torch.utils.tensorboard import SummaryWriter

        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or _output(args) / "runs"
        sinks.append(TensorBoardSink(SummaryWriter(str(Path(folder, "depass")))))
    if "mlflow" in services:
        import mlflow  # type: ignore[import-not-found]

        if (run := mlflow.active_run()) is not None:
            sinks.append(MLflowSink(mlflow.MlflowClient(), run.info.run_id))
    return sinks
