"""`ProbeMonitor`: what a model in training relies on, for any training loop.

1. The probe sets are loaded once; all ranks use the first rank's.
2. In a run, every rank attributes its share, `range(rank, n, world)`, with the model itself rather than its
   distributed wrapper: a plain forward pass needs no other rank, so shares may be uneven or empty.
   All ranks gather weights that FSDP2 shards together: every rank then attributes every probe.
3. The shares are gathered once. Every rank then has every outcome: all of them compute the same numbers and
   keep the same history, and none waits for another.

Training is not affected: DePass leaves the model as it was, and `isolated` the rest of the process.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

from torch import nn
from transformers import PreTrainedTokenizerBase

from depass_lightning.attribution.attribute import settings_by_rule
from depass_lightning.attribution.automatic_rule import AUTO
from depass_lightning.attribution.settings import RuleOptions
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError, reason_of
from depass_lightning.models.sharding import mixed_precision
from depass_lightning.monitoring.alarms import AlarmEvent, Alarms, name_alarms, raise_alarms
from depass_lightning.monitoring.discovery import ModelFinder, TrackedModel, find_tokenizer
from depass_lightning.monitoring.history import SCALARS, History
from depass_lightning.monitoring.maps import page
from depass_lightning.monitoring.probe_circuits import CIRCUIT_SCALARS
from depass_lightning.monitoring.probe_sets import (
    AnswerPart,
    ProbePrompt,
    ProbeSource,
    TargetKind,
    check_target_kind,
    load_set,
    name_sets,
)
from depass_lightning.monitoring.publish import publish
from depass_lightning.monitoring.results import Result, result_of
from depass_lightning.monitoring.runner import Failure, Outcome, ProbeRunner, isolated, report_failures
from depass_lightning.monitoring.sinks import Sink
from depass_lightning.monitoring.sources import Sources, fitting, name_sources
from depass_lightning.monitoring.throttle import FREE_SECONDS, Throttle
from depass_lightning.utils.distributed import from_all, from_first, place, sharing

log = logging.getLogger(__name__)

OVERHEAD = "depass/overhead"


class MonitorOptions(RuleOptions, total=False):
    """The options that `ProbeMonitor` documents."""

    size: int
    source: Sources
    target: TargetKind
    answer: AnswerPart
    max_overhead: float | None
    faithfulness: int
    circuit: bool
    batch_size: int
    on_error: Literal["log", "raise"]
    alarms: Alarms
    control: str | None
    scalars: Literal["main", "all"]


@dataclass(frozen=True)
class MonitorResult:
    """The result of one run of all probe sets, the same on every rank.

    Attributes:
        step: the optimiser step.
        scalars: the means of every set by their full names, such as `depass/ioi/value`.
        results: one per probe set and source; empty if the run is not new.
        new: False if this step had a run already, whose scalars these are.
        events: the alarms that this run has raised.
        stop: whether one of them ends training.
    """

    step: int
    scalars: Mapping[str, float]
    results: Sequence[Result] = ()
    new: bool = True
    events: Sequence[AlarmEvent] = ()
    stop: bool = False

    @property
    def pages(self) -> dict[str, str]:
        """The HTML page of every result that has attributions, by the results' names."""
        return {result.name: page(result) for result in self.results if result.attributions}


class ProbeMonitor:
    """Attributes held-out probes while a model trains, in any training loop.

    Where `torch.distributed` has a process group, its ranks share the probes, and all of them have to call
    `run` and `due` at the same steps.

    Args:
        model: the module that is trained; the language model is searched inside it. None to `bind` one later.
        tokenizer: the model's tokenizer; None for the one that the model's name loads.
        probes: a task or its name ("ioi"), a file of JSON lines, a DataLoader (see
            `monitoring/dataloader_prompts.py`), a list of `(prompt, target)` or of `Example`; or a mapping
            from names to such sets.
        size: the maximum number of probes of each set.
        source: what the states are split into: a source or its name ("tokens", "heads", ...), by default
            tokens; or several in a list or a mapping from names, which share one pass.
        target: what is explained: "contrast", each probe's target, against its foil where it has one;
            "token", without the foil; "centred", that less the mean logit; "log_odds", the token against all
            others; "logprob", its log-probability; "own", the model's most likely next token.
        answer: "whole" explains all tokens of an answer, "first" only its first token.
        max_overhead: the largest fraction of the wall time for probes (`due`), past a first minute; or None.
        faithfulness: the number of probes of each set for which token removal is measured.
        circuit: also write each set's mean circuit, by a linear rule (`half` for `auto`), and compare its
            largest edges with earlier runs'.
        batch_size: the number of probes in one pass; a batch that fails is halved until the probe to blame is
            found.
        on_error: "log" reports a failing probe and its reason; "raise" raises an error.
        alarms: conditions on scalars, see `monitoring/alarms.py`; a mapping has an action for each: "log",
            "stop" to end training, or a function of the `AlarmEvent`.
        control: the probe set whose answers should not change; its changes give the others' null bands.
        scalars: "all" also logs the bootstrap interval of every mean.
        settings: `rule`, by default `auto`, `temperature`, `bias`, `engine` and `attention_path`, as for
            `DePass.attribute`.

    Raises:
        DePassError: an argument is invalid, or the probes, the model or the tokenizer cannot be found.
    """

    def __init__(
        self,
        model: nn.Module | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        probes: ProbeSource | Mapping[str, ProbeSource] = "ioi",
        *,
        size: int = 16,
        source: Sources = None,
        target: TargetKind = "contrast",
        answer: AnswerPart = "whole",
        max_overhead: float | None = 0.05,
        faithfulness: int = 4,
        circuit: bool = False,
        batch_size: int = 8,
        on_error: Literal["log", "raise"] = "log",
        alarms: Alarms = (),
        control: str | None = None,
        scalars: Literal["main", "all"] = "main",
        **settings: Unpack[RuleOptions],
    ) -> None:
        for name, number in (("size", size), ("batch_size", batch_size)):
            if number < 1:
                raise DePassError(f"{name} must be at least 1, not {number}")
        if max_overhead is not None and not 0 < max_overhead <= 1:
            raise DePassError(f"max_overhead is a fraction of the time, in (0, 1]; not {max_overhead}")
        if faithfulness < 0:
            raise DePassError(f"faithfulness must be a number of probes, 0 for none; not {faithfulness}")
        for name, value, known in (("on_error", on_error, "log raise"), ("scalars", scalars, "main all")):
            if value not in known.split():
                raise DePassError(f"{name} must be {' or '.join(map(repr, known.split()))}, not {value!r}")
        if unknown := sorted(set(settings) - RuleOptions.__annotations__.keys()):
            raise DePassError(
                f"there is no setting {unknown[0]!r}; there are {', '.join(RuleOptions.__annotations__)}"
            )
        check_target_kind(target, answer)
        self.probes, self.sources = name_sets(probes), name_sources(source)
        self.size, self.batch_size = size, batch_size
        known = (*SCALARS, *(CIRCUIT_SCALARS if circuit else ()), "failed")
        self.alarms = name_alarms(alarms, known, self.probes, control)
        self.target: TargetKind = target
        self.answer: AnswerPart = answer
        self.control, self.logged, self.faithfulness, self.circuit = control, scalars, faithfulness, circuit
        self.on_error: Literal["log", "raise"] = on_error
        self.settings: RuleOptions = {"rule": AUTO, **settings}
        self.throttle = Throttle(max_overhead, free=FREE_SECONDS)
        self.history: dict[str, History] = {}
        self.sets: dict[str, list[ProbePrompt]] = {}
        self.step: int | None = None
        self.scalars: dict[str, float] = {}
        self._skipped: int | None = None
        self._model: TrackedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._runner: ProbeRunner | None = None
        if model is not None:
            self.bind(model, [tokenizer])

    @property
    def bound(self) -> bool:
        """Whether there is a model to attribute."""
        return self._model is not None

    def load(self) -> None:
        """Load the probe sets, so that a mistake in them is found before anything expensive."""
        if not self.sets:
            with isolated(), sharing():
                # a loader may give every rank other rows
                self.sets = from_first(
                    lambda: {
                        name: load_set(name, probes, self.size, self.target, self.answer)
                        for name, probes in self.probes.items()
                    }
                )

    def bind(
        self,
        module: nn.Module,
        tokenizers: Sequence[Any] = (),
        where: ModelFinder | None = None,
        trained: Collection[nn.Parameter] = (),
    ) -> None:
        """Find the language model and its tokenizer in a module.

        At every run the model is searched again: parts of it may have been replaced, as by adapters that are
        added in the middle of a training.

        Args:
            module: the module that is trained.
            tokenizers: where a tokenizer may be, by priority; entries may be None.
            where: the path of an attribute of the module, or a function of the module that returns the
                model; None to search.
            trained: the parameters that are trained: of several language models, the one that has them is
                taken.

        Raises:
            DePassError: there is no such model or no tokenizer, or a setting does not suit the model.
        """
        self.load()
        text = any(probe.ids is None for probes in self.sets.values() for probe in probes)
        model = TrackedModel(module, where, trained)
        with isolated(model.device):
            self._tokenizer = tokenizer = find_tokenizer(model.model, tokenizers, needed=text)
            with model.opened():
                runner = self._make_runner(model)
            if tokenizer is not None and text:
                # a classifier's label is one output, however many tokens its name has
                part = self.answer if runner.depass.decoder.head.kind == "causal" else "first"
                for name, probes in self.sets.items():
                    self.sets[name] = [
                        probe if probe.ids else probe.formatted(tokenizer, self.target, part)
                        for probe in probes
                    ]
            self._model, self._runner = model, runner
        precision, weights = mixed_precision(module), next(model.model.parameters()).dtype
        if precision is not None and precision != weights:
            log.info(
                "MixedPrecisionPolicy trains in %s; the probes are attributed with the weights in %s",
                precision,
                weights,
            )

    def release(self) -> None:
        """Release the model."""
        self._model = self._runner = None

    def start(self, step: int = 0) -> None:
        """Start to measure the time, when training starts; a training that starts over has a new history.

        Args:
            step: the optimiser step at which it starts.
        """
        self.throttle.start()
        self._skipped = None
        if self.step is not None and step < self.step:
            self.step, self.history = None, {}

    def due(self, step: int) -> bool:
        """Whether there is time for a run; all ranks get the same answer, which holds for one step.

        Args:
            step: the optimiser step.
        """
        if self.throttle.limit is None or step == self.step:
            return True
        if step == self._skipped:
            return False
        with sharing():  # ranks have different clocks, but a run needs all of them
            due = from_first(self.throttle.has_room)
        self._skipped = None if due else step
        return due

    def run(self, step: int, *, record: bool = True) -> MonitorResult:
        """Run every probe set, on all ranks together; once at an optimiser step.

        Args:
            step: the optimiser step.
            record: append the run to the history; False to run in an evaluation outside of training.

        Raises:
            DePassError: no model is bound; or a probe failed, where `on_error` is "raise".
        """
        if record and step == self.step:
            return MonitorResult(step, self.scalars, new=False)
        if self._model is None:
            raise DePassError("this ProbeMonitor has no model; call bind(model, [tokenizer]) first")
        began = self.throttle.clock()
        first = self.throttle.unused
        with isolated(self._model.device), self._model.opened(), sharing():
            results = self._results(self._model, step, record)
        scalars = {name: value for result in results for name, value in result.scalars.items()}
        if self.logged == "all":
            scalars |= {name: value for result in results for name, value in result.ends.items()}
        raised = raise_alarms(self.alarms, results, self.control) if record else []
        if record:
            self.throttle.spend(self.throttle.clock() - began)
            if not first:  # of a training that has just started, the first run would be all of the time
                with sharing():
                    scalars[OVERHEAD] = from_first(lambda: self.throttle.share)
            self.step, self.scalars = step, scalars
        stop = any(alarm.action == "stop" for alarm, _ in raised)
        return MonitorResult(step, scalars, results, events=[event for _, event in raised], stop=stop)

    def publish(
        self, result: MonitorResult, sinks: Sequence[Sink], folder: str | Path, step: int | None = None
    ) -> None:
        """Write a run's pages and scores, and pass everything to the sinks; on the first rank only.

        Args:
            result: what `run` returned; one that is not new is ignored.
            sinks: where the scalars and the maps are logged.
            folder: the folder whose subfolder `depass` the files are written to.
            step: the step under which sinks log; None for the optimiser step.
        """
        with sharing():
            rank, _ = place()
        if rank != 0 or not result.new:
            return
        began = self.throttle.clock()
        with isolated():
            logged = result.step if step is None else step
            publish(result.results, result.scalars, sinks, Path(folder), logged, self.on_error == "raise")
        self.throttle.extend(self.throttle.clock() - began)

    def state_dict(self) -> dict[str, Any]:
        """Return the last run's step and scalars and the history, as plain containers and tensors."""
        history = {name: past.state_dict() for name, past in self.history.items()}
        return {"step": self.step, "scalars": dict(self.scalars), "history": history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the history of a checkpoint: its curves and similarities.

        Args:
            state: a result of `state_dict`.
        """
        self.step, self.scalars = state["step"], dict(state["scalars"])
        self.history = {name: History.from_state_dict(past) for name, past in state["history"].items()}

    def _make_runner(self, model: TrackedModel) -> ProbeRunner:
        depass = DePass(model.model, self._tokenizer)
        sources = fitting(depass, list(self.sources.values()))
        settings_by_rule(depass.decoder, sources, **self.settings)  # checks them before training begins
        options = self.batch_size, model.sharded, self.settings, self.circuit
        return ProbeRunner(depass, model.device, sources, *options)

    def _results(self, model: TrackedModel, step: int, record: bool) -> list[Result]:
        """Attribute this rank's share, gather the others', and measure each set under each source."""
        rank, world_size = place()
        if model.sharded:
            shares = from_all(lambda: self._shares(model, 0, 1))[:1]
        else:
            shares = from_all(lambda: self._shares(model, rank, world_size))
        results: list[Result] = []
        control: dict[str, dict[str, list[float]]] = {}
        for name, probes in sorted(self.sets.items(), key=lambda named: named[0] != self.control):
            outcomes = {i: outcome for share in shares for i, outcome in share[name].items()}
            report_failures(name, step, probes, outcomes, self.on_error, rank)
            for index, source in enumerate(self.sources):
                key = name if len(self.sources) == 1 else f"{name}/{source}"
                history = self.history.get(key, History())
                options = history, control.get(source), self.circuit and index == 0
                result = result_of(key, step, probes, outcomes, index, *options)
                if name == self.control:
                    control[source] = result.changes()
                if record:
                    result.record()
                    self.history[key] = history
                results.append(result)
        return results

    def _shares(self, model: TrackedModel, rank: int, world_size: int) -> dict[str, dict[int, Outcome]]:
        """Attribute this rank's probes of every set, and return the outcomes by the probes' indices."""
        shares = {name: range(rank, len(probes), world_size) for name, probes in self.sets.items()}
        try:
            if model.replaced():
                self._runner = None
            if self._runner is None:
                self._runner = self._make_runner(model)
        except DePassError as error:  # what replaced the model cannot be attributed
            failure = Failure(reason_of(error))
            return {name: dict.fromkeys(share, failure) for name, share in shares.items()}
        outcomes = {}
        for name, share in shares.items():
            removal = len(range(rank, min(self.faithfulness, len(self.sets[name])), world_size))
            attributed = self._runner.outcomes([self.sets[name][i] for i in share], removal)
            outcomes[name] = dict(zip(share, attributed, strict=True))
        self.batch_size = self._runner.batch_size
        return outcomes
