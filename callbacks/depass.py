"""DePassCallback: what the model in training bases its answers on, at every validation and checkpoint.

One run of the probes:

1. Every rank attributes its own share, `range(rank, n, world)`, with the model itself rather than its
   distributed wrapper: a plain forward pass needs no other rank, so shares may be uneven, or empty.
2. The shares are gathered, once. Every rank then holds every result: all of them log the same numbers and
   keep the same history, and none waits for another.
3. The scalars go where ModelCheckpoint and EarlyStopping look, and to the loggers; rank zero publishes the
   maps.

Training does not notice: DePass leaves the model as it was, and `isolated` the rest.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from transformers import PreTrainedTokenizerBase

from depass_lightning.attribution.settings import RuleOptions
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.monitoring.checkpoints import ranks_after_batch, ranks_after_epoch
from depass_lightning.monitoring.config import Sources, check_settings, name_sources
from depass_lightning.monitoring.discovery import ModelFinder, find_model, find_tokenizer
from depass_lightning.monitoring.history import History
from depass_lightning.monitoring.probe_sets import (
    ProbePrompt,
    ProbeSource,
    TargetKind,
    check_target_kind,
    load_set,
    name_sets,
)
from depass_lightning.monitoring.publish import is_named, publish
from depass_lightning.monitoring.results import Result, result_of
from depass_lightning.monitoring.runner import Failure, Outcome, ProbeRunner, gather, isolated
from depass_lightning.monitoring.throttle import Throttle

log = logging.getLogger(__name__)

SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


class DePassCallback(Callback):
    """Attributes held-out probes while a model trains, and logs what changes.

    It runs when training starts and ends, at every validation, and whenever a checkpoint is written, but
    never twice at one optimiser step. With `trainer.validate` it runs once, and leaves the history alone.

    Args:
        probes: a task or its name ("ioi"), a file of JSON lines, a DataLoader (see
            `monitoring/dataloader_prompts.py`), a list of `(prompt, target)` or of `Example`; or a mapping
            that gives several such sets their names.
        size: how many probes of each set to take at most.
        source: what the states are split into: a source or its name ("tokens", "heads", ...), or several in a
            list or by names of your own; these share one pass, and are logged apart. `Tokens()` where None.
        target: what is explained: "contrast", each probe's target, against its foil where it has one;
            "token", without the foil; "own", the model's own most likely next token.
        tokenizer: the model's; where None the LightningModule's or the data module's `tokenizer`, or that
            of the model's own name.
        model: where the language model is, if it is not to be searched for: the path of an attribute of the
            LightningModule, or a function of the LightningModule.
        every_n_steps: run every so many optimiser steps, too.
        max_overhead: the largest share of the wall time that it may take; to stay below, it skips runs, but
            for the first and the last. None for no limit.
        faithfulness: for how many probes of each set it measures what removing tokens does to the answer.
        batch_size: probes in one pass; a batch that fails is halved until the probe to blame is found.
        on_error: what a failing probe does: "log" says which and why, and training goes on; "raise" ends it.
        folder: where pages and scores are written, in a folder `depass`; that of the first logger where None,
            or the trainer's `default_root_dir` without a logger.
        settings: `rule`, `temperature`, `bias`, `engine` and `attention_path`, as for `DePass.attribute`.

    Raises:
        DePassError: for arguments that make no sense; when training starts, for probes, a model or a
            tokenizer that cannot be found, and for strategies that shard the model's weights.
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
                f"max_overhead is a share of the time, above 0 and at most 1; not {max_overhead}"
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
        self.on_error = on_error
        self.folder = folder
        self.history: dict[str, History] = {}
        self.pace = Throttle(max_overhead)
        self._given = name_sets(probes)
        self._sets: dict[str, list[ProbePrompt]] = {}
        self._prober: ProbeRunner | None = None
        self._step: int | None = None
        self._skipped: int | None = None
        self._scalars: dict[str, float] = {}
        self._interrupted = False

    @property
    def state_key(self) -> str:
        """What tells this callback's state in a checkpoint from another's: its sets, and what is unusual."""
        usual = {"rule": "softmax", "attention_path": "content", "source": ["tokens"], "target": "contrast"}
        given = {"source": list(self.sources), "target": self.target, **self.settings}
        unusual = {name: given[name] for name in usual if given.get(name, usual[name]) != usual[name]}
        return self._generate_state_key(probes=sorted(self._given), **unusual)

    def state_dict(self) -> dict[str, Any]:
        """Return the last run's step and scalars and the history, as plain containers and tensors."""
        history = {name: past.state_dict() for name, past in self.history.items()}
        return {"step": self._step, "scalars": dict(self._scalars), "history": history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the history of a checkpoint, so that curves and similarities go on from it."""
        self._step, self._scalars = state_dict["step"], dict(state_dict["scalars"])
        self.history = {name: History.from_state_dict(past) for name, past in state_dict["history"].items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the probes, so that a mistake in them is found before anything expensive."""
        self._interrupted = False
        if is_named(trainer.strategy, *SHARDED):
            raise DePassError(
                f"{type(trainer.strategy).__name__} spreads the model's weights over ranks, but "
                "DePassCallback needs them whole on each; train with strategy='ddp', or leave it out"
            )
        others = [own for own in trainer.callbacks if own is not self and isinstance(own, DePassCallback)]  # type: ignore[attr-defined]
        if both := sorted({name for own in others for name in own._given} & self._given.keys()):
            raise DePassError(
                f"two DePassCallbacks have a probe set called {both[0]!r}, and write to the same places; "
                f"give it another name in one of them: probes={{'{both[0]}_2': ...}}"
            )
        if stage in ("fit", "validate") and not self._sets:
            with isolated():
                sets = {
                    name: load_set(name, given, self.size, self.target) for name, given in self._given.items()
                }
            # a loader may give each rank rows of its own
            self._sets = trainer.strategy.broadcast(sets)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the model, now that it is on its device, before the first batch."""
        self._find(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the model where `trainer.validate` runs alone."""
        self._find(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run once before training: the first reference."""
        self.pace.start()
        self._skipped = None
        if self._step is not None and trainer.global_step < self._step:  # another training begins
            self._step, self.history = None, {}
        self._run_and_log(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run where `every_n_steps` says so, and before a checkpoint is ranked by a probe's scalar."""
        asked = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if (asked or ranks_after_batch(trainer)) and self._due(trainer):
            self._run_and_log(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run before a checkpoint is ranked by a probe's scalar at the end of an epoch without validation."""
        if ranks_after_epoch(trainer) and self._due(trainer):
            self._run_and_log(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run with the validation, and log the scalars beside its own."""
        if trainer.sanity_checking:
            return
        scalars, new = self._run(trainer) if self._due(trainer) else (self._scalars, False)
        if not new:
            _watched(trainer, scalars)
            return
        for name, value in scalars.items():
            # the ranks agree already, but Lightning warns unless it may make sure
            pl_module.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Run for the checkpoint that is being written, and put the run into it."""
        if self._prober is not None and not self._interrupted and trainer.state.fn == TrainerFn.FITTING:
            if self._due(trainer):
                self._run_and_log(trainer)
            else:
                _watched(trainer, self._scalars)
            # Lightning collected the callbacks' states before it called this
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run on the weights that training ends with."""
        self._run_and_log(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Run no more: other ranks may be gone, and nothing could be gathered."""
        self._interrupted = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the model."""
        self._prober = None

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._prober is None:
            model = find_model(pl_module, self.model)
            sources = list(self.sources.values())
            with isolated(model.device):
                text = any(probe.ids is None for probes in self._sets.values() for probe in probes)
                tokenizer = find_tokenizer(trainer, pl_module, model, self.tokenizer, needed=text)
                depass = DePass(model, tokenizer)
                check_settings(depass, sources, self.settings)
            self._prober = ProbeRunner(depass, model.device, sources, self.batch_size, self.settings)

    def _due(self, trainer: Trainer) -> bool:
        """Say, on all ranks alike, whether there is room for a run here; one answer a step."""
        step = trainer.global_step
        if self.pace.limit is None or trainer.state.fn != TrainerFn.FITTING or step == self._step:
            return True
        if step == self._skipped:
            return False
        # every rank has a clock of its own, but a run needs all of them
        due = trainer.strategy.broadcast(trainer.is_global_zero and self.pace.has_room())
        self._skipped = None if due else step
        return due

    def _run_and_log(self, trainer: Trainer) -> None:
        """Run outside of a validation, where Lightning's own logging would wait for it or refuse."""
        scalars, new = self._run(trainer)
        _watched(trainer, scalars)
        for logger in trainer.loggers if new else ():
            logger.log_metrics(scalars, step=_logged_step(trainer))
            logger.save()

    def _run(self, trainer: Trainer) -> tuple[dict[str, float], bool]:
        """Run every probe set, on all ranks together.

        Returns:
            The scalars, and True; or, where this optimiser step had its run, that one's scalars and False.
        """
        step, fitting = trainer.global_step, trainer.state.fn == TrainerFn.FITTING
        if self._prober is None or (fitting and step == self._step):
            return self._scalars, False
        began = self.pace.clock()
        with isolated(self._prober.device):
            shares = gather({name: self._share(trainer, probes) for name, probes in self._sets.items()})
            results = []
            for name in self._sets:
                outcomes = {i: outcome for share in shares for i, outcome in share[name].items()}
                results += self._results(name, step, outcomes, fitting)
            self._publish(trainer, results)
        scalars = {name: value for result in results for name, value in result.scalars.items()}
        if fitting:
            self.pace.spend(self.pace.clock() - began)
            scalars["depass/overhead"] = trainer.strategy.broadcast(self.pace.share)
            self._step, self._scalars = step, scalars
        return scalars, True

    def _share(self, trainer: Trainer, probes: list[ProbePrompt]) -> dict[int, Outcome]:
        """Attribute this rank's probes, and return the outcomes by the probes' indices."""
        assert self._prober is not None
        mine = range(trainer.global_rank, len(probes), trainer.world_size)
        removal = len(range(trainer.global_rank, min(self.faithfulness, len(probes)), trainer.world_size))
        outcomes = self._prober.outcomes([probes[i] for i in mine], removal)
        return dict(zip(mine, outcomes, strict=True))

    def _results(self, name: str, step: int, outcomes: Mapping[int, Outcome], record: bool) -> list[Result]:
        """Measure what came of a set's probes, source by source, and append it where `record` says so."""
        probes = self._sets[name]
        failed = {probes[i].id: o.reason for i, o in sorted(outcomes.items()) if isinstance(o, Failure)}
        self._report(name, step, failed)
        results = []
        for index, source in enumerate(self.sources):
            key = name if len(self.sources) == 1 else f"{name}/{source}"
            history = self.history.get(key, History())
            result = result_of(key, step, probes, outcomes, index, history)
            if record:
                ids = [probe.id for probe in result.probes]
                history.add(step, result.metrics, dict(zip(ids, result.attributions, strict=True)))
                self.history[key] = history
            results.append(result)
        return results

    def _report(self, name: str, step: int, failed: Mapping[str, str]) -> None:
        """Say which probes failed, those that did so for one reason together; or raise for the first."""
        for reason in dict.fromkeys(failed.values()):
            probes = [repr(probe) for probe, own in failed.items() if own == reason]
            some = ", ".join(probes[:3]) + (f" and {len(probes) - 3} more" if len(probes) > 3 else "")
            message = f"probe{'s' * (len(probes) > 1)} {some} of {name!r} failed at step {step}: {reason}"
            if self.on_error == "raise":
                raise DePassError(message)
            rank_zero_only(log.warning)(message)

    def _publish(self, trainer: Trainer, results: list[Result]) -> None:
        """Write the maps and hand them to the loggers, on rank zero."""
        logs = trainer.log_dir  # on every rank: Lightning broadcasts it
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        folder = Path(self.folder or logs or trainer.default_root_dir)
        for result in results:
            publish(result, trainer.loggers, folder, _logged_step(trainer), self.on_error == "raise")


def _watched(trainer: Trainer, scalars: Mapping[str, float]) -> None:
    """Put scalars where ModelCheckpoint and EarlyStopping look."""
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})


def _logged_step(trainer: Trainer) -> int:
    """Return the step that Lightning itself logs under, so that curves line up with the loss.

    It differs from `global_step` where several optimisers step on one batch.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped
