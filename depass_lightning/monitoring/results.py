"""The result of one run of the probes, for one set and one source."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from depass_lightning.faithfulness import Case, Columns
from depass_lightning.monitoring.history import (
    SCALARS,
    Band,
    History,
    intervals,
    measure,
    similarities,
    summarise,
)
from depass_lightning.monitoring.probe_circuits import CIRCUIT_SCALARS, largest_edges, overlaps
from depass_lightning.monitoring.probe_sets import ProbePrompt
from depass_lightning.monitoring.runner import Finding, Outcome
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.circuit import Circuit
from depass_lightning.results.comparison import Comparison

BANDED = ("value", "probability", "on_target", "similarity_first", "spearman_first")


@dataclass(frozen=True)
class Result:
    """The result of one run for one probe set under one source.

    Attributes:
        name: the set's name, or `<set>/<source>` where there are several sources.
        step: the optimiser step.
        probes: those that succeeded.
        attributions: one per probe.
        curves: each probe's columns of `TokenRemoval`; empty if they were not measured.
        drifts: each probe's comparison with its `first` and its `previous` run.
        rows: the scalars of each probe.
        metrics: the scalars of the set.
        history: the runs so far, this one included.
        bands: the null bands of its scalars, where there are control prompts.
        circuit: the mean over the probes, under the first source; None if it was not computed.
    """

    name: str
    step: int
    probes: Sequence[ProbePrompt]
    attributions: Sequence[Attribution]
    curves: Sequence[Columns]
    drifts: Sequence[Mapping[str, Comparison]]
    rows: Sequence[dict[str, float]]
    metrics: dict[str, float]
    history: History
    bands: Mapping[str, Band] = field(default_factory=dict)
    circuit: Circuit | None = None

    @property
    def by_id(self) -> dict[str, dict[str, float]]:
        """The scalars of each probe, by the probes' ids."""
        return {probe.id: row for probe, row in zip(self.probes, self.rows, strict=True)}

    @property
    def intervals(self) -> dict[str, Band]:
        """The bootstrap 95% interval of each mean over the probes."""
        return intervals(self.rows, list(self.metrics))

    @property
    def scored(self) -> dict[str, Attribution]:
        """The attributions by the probes' ids."""
        return {probe.id: scored for probe, scored in zip(self.probes, self.attributions, strict=True)}

    @property
    def scalars(self) -> dict[str, float]:
        """The set's scalars by their full names, as loggers and `trainer.callback_metrics` have them."""
        return _named(self.name, self.metrics) | _named(self.name, self.bands, "_null")

    @property
    def ends(self) -> dict[str, float]:
        """The ends of the intervals by their full names: `depass/ioi/value_low`, `depass/ioi/value_high`."""
        return _named(self.name, self.intervals)

    def record(self) -> None:
        """Append the run to the history."""
        edges = largest_edges(self.circuit)
        self.history.add(self.step, self.metrics, self.scored, self.by_id, self.bands, edges)

    def changes(self) -> dict[str, list[float]]:
        """Return each probe's change since its first run of every scalar that has a null band."""
        return {name: self.history.changes(name, self.by_id) for name in BANDED if name in self.metrics}


def _named(result: str, values: Mapping[str, float | Band], suffix: str = "") -> dict[str, float]:
    """Return scalars, or both ends of ranges, by their full names."""
    named: dict[str, float] = {}
    for name, value in values.items():
        full = f"depass/{result}/{name}{suffix}"
        named |= (
            {f"{full}_low": value[0], f"{full}_high": value[1]} if isinstance(value, tuple) else {full: value}
        )
    return named


def result_of(
    name: str,
    step: int,
    probes: Sequence[ProbePrompt],
    outcomes: Mapping[int, Outcome],
    index: int,
    history: History,
    control: Mapping[str, Sequence[float]] | None = None,
    circuit: bool = False,
) -> Result:
    """Measure a source's attributions.

    Args:
        name: the result's name.
        step: the optimiser step.
        probes: the whole set.
        outcomes: each probe's outcome, by its index in the set.
        index: the source's index.
        history: the runs so far, without this one.
        control: the control prompts' changes of each scalar since their first run.
        circuit: whether circuits are compared; their overlaps are NaN where every prompt failed.
    """
    scored = [(probes[i], outcome) for i, outcome in sorted(outcomes.items()) if isinstance(outcome, Finding)]
    asked = [probe for probe, _ in scored]
    attributions = [finding.attributions[index] for _, finding in scored]
    curves = [finding.curves[index] for _, finding in scored]
    drifts = [history.compare(*pair) for pair in zip(asked, attributions, strict=True)]
    rows = [
        measure(Case(attribution, probe.evidence), curve) | similarities(drift)
        for probe, attribution, curve, drift in zip(asked, attributions, curves, drifts, strict=True)
    ]
    metrics = summarise(rows, _scalars(probes, rows, history))
    metrics["failed"] = float(len(probes) - len(scored))
    circuits = [finding.circuit for _, finding in scored if finding.circuit is not None]
    mean = Circuit.mean(circuits) if circuits and circuit else None
    if mean is not None:
        metrics |= overlaps(largest_edges(mean), [*history.circuits.values()])
    elif circuit:
        metrics |= dict.fromkeys(CIRCUIT_SCALARS, math.nan)
    bands = history.null_band(metrics, control or {})
    return Result(name, step, asked, attributions, curves, drifts, rows, metrics, history, bands, mean)


def _scalars(
    probes: Sequence[ProbePrompt], rows: Sequence[Mapping[str, float]], history: History
) -> list[str]:
    """Return the scalars that a probe has, or had; if none was ever measured, those that may follow."""
    known = {name for row in rows for name in row} | set(history.curves)
    if not known:
        known = set(SCALARS) - (set() if any(probe.evidence for probe in probes) else {"on_target"})
    return [name for name in SCALARS if name in known]
