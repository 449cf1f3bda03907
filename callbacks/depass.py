"""DePassCallback: what a model in training relies on, at every validation and checkpoint.

The hooks decide when the probes run (`monitoring/monitor.py`). Scalars are logged where ModelCheckpoint and
EarlyStopping read them, and to the loggers; rank zero publishes the maps. Training is not affected: DePass
leaves the model as it was, and `isolated` the rest of the process.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from depass_lightning.attribution.settings import RuleOptions
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.monitoring.checkpoints import ranks_after_batch, ranks_after_epoch
from depass_lightning.monitoring.config import Sources, check_settings, name_sources
from depass_lightning.monitoring.discovery import ModelFinder, find_model, find_tokenizer
from depass_lightning.monitoring.history import History
from depass_lightning.monitoring.monitor import ProbeMonitor
from depass_lightning.monitoring.probe_sets import (
    ProbePrompt,
    ProbeSource,
    TargetKind,
    check_target_kind,
    load_set,
    name_sets,
)
from depass_lightning.monitoring.publish import is_named, publish
from depass_lightning.monitoring.results import Result
from depass_lightning.monitoring.runner import ProbeRunner, isolated
from depass_lightning.monitoring.throttle import Throttle

log = logging.getLogger(__name__)

SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


class DePassCallback(Callback):
    """Attributes held-out probes while a model trains, and logs what changes.

    It runs when training starts and ends, at every validation, and whenever a checkpoint is written, but
    never twice at one optimiser step. With `trainer.validate` it runs once, and does not change the history.

    Args:
        probes: a task or its name ("ioi"), a file of JSON lines, a DataLoader (see
            `monitoring/dataloader_prompts.py`), a list of `(prompt, target)` or of `Example`; or a mapping
            from names to such sets.
        size: the maximum number of probes of each set.
        source: what the states are split into: a source or its name ("tokens", "heads", ...), or several in a
            list or a mapping from names; several share one pass and are logged separately. None for
            `Tokens()`.
        target: what is explained: "contrast", each probe's target, against its foil where it has one;
            "token", without the foil; "centred", that less the mean logit; "log_odds", the token against all
            others; "own", the model's most likely next token.
        tokenizer: the model's tokenizer; None for the `tokenizer` of the LightningModule or the data module,
            or the one that the model's name loads.
        model: where the language model is: the path of an attribute of the LightningModule, or a function of
            the LightningModule. None searches for it.
        every_n_steps: also run after every this many optimiser steps.
        max_overhead: the largest fraction of the wall time that the probes may take; to stay below it, runs
            are skipped, except the first and the last. None for no limit.
        faithfulness: the number of probes of each set for which token removal is measured.
        batch_size: the number of probes in one pass; a batch that fails is halved until the probe to blame is
            found.
        on_error: "log" reports a failing probe and its reason, and training goes on; "raise" ends training.
        folder: where pages and scores are written, in a folder `depass`; None for the first logger's folder,
            or the trainer's `default_root_dir` without a logger.
        settings: `rule`, `temperature`, `bias`, `engine` and `attention_path`, as for `DePass.attribute`.

    Raises:
        DePassError: an argument is invalid; when training starts, the probes, the model or the tokenizer
            cannot be found, or the strategy shards the model's weights.
    """

    def __init__(
        self,
        probes: ProbeSource | Mapping[str, ProbeSource] = "ioi",
        *,
        size: int = 16,
        source: Sources = None,
        target: TargetKind = "contrast",
        tokenizer: PreTrainedTokenizerBase | None = None,
        model: ModelFinder | None = None,
        every_n_steps: int | None = None,
        max_overhead: float | None = None,
        faithfulness: int = 4,
        batch_size: int = 8,
        on_error: Literal["log", "raise"] = "log",
        folder: str | Path | None = None,
        **settings: Unpack[RuleOptions],
    ) -> None:
        for name, number in (("size", size), ("every_n_steps", every_n_steps), ("batch_size", batch_size)):
            if number is not None and number < 1:
                raise DePassError(f"{name} must be at least 1, not {number}")
        if max_overhead is not None and not 0 < max_overhead <= 1:
            raise DePassError(
                f"max_overhead is a fraction of the time, above 0 and at most 1; not {max_overhead}"
            )
        if faithfulness < 0:
            raise DePassError(f"faithfulness must be a number of probes, 0 for none; not {faithfulness}")
        if on_error not in ("log", "raise"):
            raise DePassError(f"on_error must be 'log' or 'raise', not {on_error!r}")
        if unknown := sorted(set(settings) - RuleOptions.__annotations__.keys()):
            raise DePassError(
                f"there is no setting {unknown[0]!r}; there are {', '.join(RuleOptions.__annotations__)}"
            )
        check_target_kind(target)
        self.size = size
        self.sources = name_sources(source)
        self.target: TargetKind = target
        self.settings = settings
        self.tokenizer = tokenizer
        self.model = model
        self.every_n_steps = every_n_steps
        self.faithfulness = faithfulness
        self.batch_size = batch_size
        self.on_error: Literal["log", "raise"] = on_error
        self.folder = folder
        self.history: dict[str, History] = {}
        self.throttle = Throttle(max_overhead)
        self._probes = name_sets(probes)
        self._sets: dict[str, list[ProbePrompt]] = {}
        self._monitor: ProbeMonitor | None = None
        self._step: int | None = None
        self._skipped: int | None = None
        self._scalars: dict[str, float] = {}
        self._interrupted = False

    @property
    @override
    def state_key(self) -> str:
        """The key of the state in a checkpoint: the probe sets, and settings other than the defaults."""
        defaults = {
            "rule": "softmax",
            "attention_path": "content",
            "source": ["tokens"],
            "target": "contrast",
        }
        settings = {"source": list(self.sources), "target": self.target, **self.settings}
        unusual = {
            name: settings[name] for name in defaults if settings.get(name, defaults[name]) != defaults[name]
        }
        return self._generate_state_key(probes=sorted(self._probes), **unusual)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the last run's step and scalars and the history, as plain containers and tensors."""
        history = {name: past.state_dict() for name, past in self.history.items()}
        return {"step": self._step, "scalars": dict(self._scalars), "history": history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint: its curves and similarities."""
        self._step, self._scalars = state_dict["step"], dict(state_dict["scalars"])
        self.history = {name: History.from_state_dict(past) for name, past in state_dict["history"].items()}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the probes, so that a mistake in them is found before anything expensive."""
        self._interrupted = False
        if is_named(trainer.strategy, *SHARDED):
            raise DePassError(
                f"{type(trainer.strategy).__name__} shards the model's weights over ranks, but "
                "DePassCallback needs all of them on every rank; train with strategy='ddp', or leave it out"
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        others = [other for other in callbacks if other is not self and isinstance(other, DePassCallback)]
        if both := sorted({name for other in others for name in other._probes} & self._probes.keys()):
            raise DePassError(
                f"two DePassCallbacks have a probe set called {both[0]!r}, and write to the same files; "
                f"give it another name in one of them: probes={{'{both[0]}_2': ...}}"
            )
        if stage in ("fit", "validate") and not self._sets:
            with isolated():
                sets = {
                    name: load_set(name, probes, self.size, self.target)
                    for name, probes in self._probes.items()
                }
            # a loader may give every rank other rows
            self._sets = trainer.strategy.broadcast(sets)

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
        self.throttle.start()
        self._skipped = None
        if self._step is not None and trainer.global_step < self._step:  # a new training begins
            self._step, self.history = None, {}
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
        scalars, new = self._run(trainer) if self._due(trainer) else (self._scalars, False)
        if not new:
            _expose(trainer, scalars)
            return
        for name, value in scalars.items():
            # the ranks agree already, but Lightning warns unless it may synchronise
            pl_module.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Run for the checkpoint that is being written, and include the run in it."""
        if self._monitor is not None and not self._interrupted and trainer.state.fn == TrainerFn.FITTING:
            if self._due(trainer):
                self._run_and_log(trainer)
            else:
                _expose(trainer, self._scalars)
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
        self._monitor = None

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._monitor is None:
            model = find_model(pl_module, self.model)
            sources = list(self.sources.values())
            with isolated(model.device):
                text = any(probe.ids is None for probes in self._sets.values() for probe in probes)
                tokenizer = find_tokenizer(trainer, pl_module, model, self.tokenizer, needed=text)
                depass = DePass(model, tokenizer)
                check_settings(depass, sources, self.settings)
            runner = ProbeRunner(depass, model.device, sources, self.batch_size, self.settings)
            names = list(self.sources)
            self._monitor = ProbeMonitor(runner, self._sets, names, self.faithfulness, self.on_error)

    def _due(self, trainer: Trainer) -> bool:
        """Whether there is time for a run; all ranks get the same answer, which holds for one step."""
        step = trainer.global_step
        if self.throttle.limit is None or trainer.state.fn != TrainerFn.FITTING or step == self._step:
            return True
        if step == self._skipped:
            return False
        # ranks have different clocks, but a run needs all of them
        due = trainer.strategy.broadcast(trainer.is_global_zero and self.throttle.has_room())
        self._skipped = None if due else step
        return due

    def _run_and_log(self, trainer: Trainer) -> None:
        """Run outside of a validation, where Lightning's own logging would wait for it or refuse."""
        scalars, new = self._run(trainer)
        _expose(trainer, scalars)
        for logger in trainer.loggers if new else ():
            logger.log_metrics(scalars, step=_logged_step(trainer))
            logger.save()

    def _run(self, trainer: Trainer) -> tuple[dict[str, float], bool]:
        """Run every probe set, on all ranks together.

        Returns:
            The scalars, and True; or, where this optimiser step already had a run, its scalars and False.
        """
        step, fitting = trainer.global_step, trainer.state.fn == TrainerFn.FITTING
        if self._monitor is None or (fitting and step == self._step):
            return self._scalars, False
        began = self.throttle.clock()
        with isolated(self._monitor.runner.device):
            ranks = trainer.global_rank, trainer.world_size
            results = self._monitor.run(self.history, step, *ranks, record=fitting)
            self._publish(trainer, results)
        scalars = {name: value for result in results for name, value in result.scalars.items()}
        if fitting:
            self.throttle.spend(self.throttle.clock() - began)
            scalars["depass/overhead"] = trainer.strategy.broadcast(self.throttle.share)
            self._step, self._scalars = step, scalars
        return scalars, True

    def _publish(self, trainer: Trainer, results: list[Result]) -> None:
        """Write the maps and pass them to the loggers, on rank zero."""
        logs = trainer.log_dir  # on every rank: Lightning broadcasts it
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        folder = Path(self.folder or logs or trainer.default_root_dir)
        for result in results:
            publish(result, trainer.loggers, folder, _logged_step(trainer), self.on_error == "raise")


def _expose(trainer: Trainer, scalars: Mapping[str, float]) -> None:
    """Put scalars where ModelCheckpoint and EarlyStopping read them."""
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})


def _logged_step(trainer: Trainer) -> int:
    """Return the step that Lightning logs under, so that curves align with the loss.

    It differs from `global_step` where several optimisers step on one batch.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped
