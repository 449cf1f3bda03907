"""Attributes one rank's share of the probes in batches, without side effects; failures stay separate."""

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from depass_lightning.attribution.settings import RuleOptions
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError, reason_of
from depass_lightning.faithfulness import Case, Columns, TokenRemoval, evaluate
from depass_lightning.monitoring.probe_circuits import circuit_of_probe, circuit_options
from depass_lightning.monitoring.probe_sets import ProbePrompt
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.circuit import Circuit
from depass_lightning.sources import Source
from depass_lightning.utils.distributed import from_all, sharing

log = logging.getLogger(__name__)

REMOVED = (0, 20, 40, 60, 80, 100)  # percent: coarse, because it is measured often
ORDERS = 2  # random orders per probe
SHOWN = 3  # the number of failed probes that are named


@dataclass(frozen=True)
class Failure:
    """Why a probe has no attribution."""

    reason: str


@dataclass(frozen=True)
class Finding:
    """The attributions of a probe.

    Attributes:
        attributions: one per source.
        curves: each source's columns of `TokenRemoval`; empty if they were not measured.
        circuit: the probe's circuit; None if it was not computed.
    """

    attributions: list[Attribution]
    curves: list[Columns]
    circuit: Circuit | None = None


Outcome = Finding | Failure


@dataclass
class ProbeRunner:
    """Attributes probes; one that fails does not affect the others.

    Attributes:
        depass: the model.
        device: the model's device.
        sources: what states are split into; those under one rule share one recorded pass and, if the rule is
            linear, one backward pass.
        batch_size: the number of probes in one pass. It is halved permanently where memory runs out.
        together: all ranks run the same probes, because their weights are sharded: a batch that fails on one
            has failed on all.
        settings: the rule and other settings of `DePass.attribute`.
        circuit: compute the probes' circuits too.
    """

    depass: DePass
    device: torch.device
    sources: Sequence[Source]
    batch_size: int
    together: bool = False
    settings: RuleOptions = field(default_factory=RuleOptions)
    circuit: bool = False

    def __post_init__(self) -> None:
        if self.circuit and not self.depass.decoder.causal:
            name = type(self.depass.model).__name__
            raise DePassError(f"circuit=True is for causal models, and {name} is an encoder; leave it out")
        self.circuit_options = circuit_options(self.settings) if self.circuit else {}

    def outcomes(self, probes: Sequence[ProbePrompt], removal: int = 0) -> list[Outcome]:
        """Return each probe's outcome, in order.

        Args:
            probes: all as text, or all as ids.
            removal: the number of probes, from the first, for which token removal is measured.
        """
        done: list[Outcome] = []
        while len(done) < len(probes):
            batch = probes[len(done) : len(done) + self.batch_size]
            done += self._halving(batch, max(0, removal - len(done)))
        return done

    def _halving(self, probes: Sequence[ProbePrompt], removal: int) -> list[Outcome]:
        """Attribute a batch; where it fails, its halves, until the probe to blame is alone."""
        outcomes, reason, out_of_memory = list[Outcome](), "", False
        try:
            outcomes = self._outcomes(probes, removal)
        except torch.OutOfMemoryError as error:
            reason, out_of_memory = reason_of(error), True
        except Exception as error:
            log.debug("attributing %d probes failed", len(probes), exc_info=True)
            reason = reason_of(error)
        # after the handlers: inside them, the error's traceback would keep the failed pass's memory
        if self.together:
            with sharing():
                faults = from_all(lambda: (out_of_memory, reason))
            out_of_memory, reason = max(faults)
        if not reason:
            return outcomes
        if len(probes) == 1:
            return [Failure(reason)]
        middle = len(probes) // 2
        if out_of_memory:
            self.batch_size = min(self.batch_size, middle)
            log.warning("memory ran out on %d probes; there are %d in a pass now", len(probes), middle)
        return self._halving(probes[:middle], removal) + self._halving(
            probes[middle:], max(0, removal - middle)
        )

    def _outcomes(self, probes: Sequence[ProbePrompt], removal: int) -> list[Outcome]:
        scored = self.depass.attribute_sources(
            **_prompts(probes),
            target=[probe.target for probe in probes],
            sources=self.sources,
            batch_size=len(probes),
            **self.settings,
        )
        outcomes = [_checked(attributions) for attributions in scored]
        if self.circuit:
            outcomes = [
                replace(outcome, circuit=circuit_of_probe(self.depass, probe, self.circuit_options))
                if isinstance(outcome, Finding)
                else outcome
                for probe, outcome in zip(probes, outcomes, strict=True)
            ]
        sample = [outcome for outcome in outcomes[:removal] if isinstance(outcome, Finding)]
        self._remove([(finding, i) for finding in sample for i in range(len(self.sources))])
        return outcomes

    def _remove(self, places: Sequence[tuple[Finding, int]]) -> None:
        """Measure token removal, where components represent text and the target is a token."""
        removal = TokenRemoval(
            percents=REMOVED,
            draws=ORDERS,
            batch_size=8 * self.batch_size,  # plain passes: no components to hold
            rationales=(),
            keep_last=True,  # without its last token a prompt asks for something else
        )
        curves = evaluate([Case(finding.attributions[i]) for finding, i in places], [removal], self.depass)
        for (finding, i), columns in zip(places, curves, strict=True):
            finding.curves[i] = columns


def report_failures(
    name: str,
    step: int,
    probes: Sequence[ProbePrompt],
    outcomes: Mapping[int, Outcome],
    on_error: Literal["log", "raise"],
    rank: int,
) -> None:
    """Report the probes that failed, grouped by reason.

    Args:
        name: the set's name.
        step: the optimiser step.
        probes: the whole set.
        outcomes: each probe's outcome, by its index in the set.
        on_error: "raise" raises for the first reason.
        rank: the process; the first one logs.

    Raises:
        DePassError: a probe failed, and `on_error` is "raise".
    """
    failures: dict[str, list[str]] = {}
    for i, outcome in sorted(outcomes.items()):
        if isinstance(outcome, Failure):
            failures.setdefault(outcome.reason, []).append(repr(probes[i].id))
    for reason, failed in failures.items():
        more = f" and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
        some = ", ".join(failed[:SHOWN]) + more
        message = f"probe{'s' * (len(failed) > 1)} {some} of {name!r} failed at step {step}: {reason}"
        if on_error == "raise":
            raise DePassError(message)
        if rank == 0:
            log.warning(message)


@contextmanager
def isolated(device: torch.device | None = None) -> Iterator[None]:
    """Preserve the random states, and disable the trainer's autocast and inference mode.

    Args:
        device: the model's device; a CUDA device's random state is preserved too.
    """
    kind = "cpu" if device is None else device.type
    python, numpy = random.getstate(), np.random.get_state()
    on_gpu = [device] if device is not None and kind == "cuda" else []
    try:
        with (
            torch.random.fork_rng(on_gpu),
            torch.inference_mode(False),
            torch.no_grad(),  # inside, because leaving inference mode turns gradients on
            torch.autocast(kind, enabled=False),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _prompts(probes: Sequence[ProbePrompt]) -> dict[str, Any]:
    """Return the probes as the prompts of a call: as text, or as ids padded on the right."""
    rows = [probe.ids for probe in probes if probe.ids is not None]
    if not rows:
        return {"prompt": [probe.prompt for probe in probes]}
    longest = max(map(len, rows))
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {"prompt": None, "input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def _checked(attributions: list[Attribution]) -> Outcome:
    for scored in attributions:
        if not (math.isfinite(scored.value) and bool(scored.scores.isfinite().all())):
            return Failure("its value or its scores are not finite")
    return Finding(attributions, [{} for _ in attributions])
