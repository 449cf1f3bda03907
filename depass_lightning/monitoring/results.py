"""What one run of the probes came to, of one set and one source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from depass_lightning.faithfulness import Case, Columns
from depass_lightning.monitoring.history import SCALARS, History, measure, similarities, summarise
from depass_lightning.monitoring.probe_sets import ProbePrompt
from depass_lightning.monitoring.runner import Finding, Outcome
from depass_lightning.results.attribution import Attribution, Comparison


@dataclass(frozen=True)
class Result:
    """What one run found of one probe set, split by one source.

    Attributes:
        name: the set's name, or `<set>/<source>` where there are several sources.
        step: the optimiser step.
        probes: those that succeeded.
        attributions: one a probe.
        curves: for each probe what removing tokens does to the answer; empty where that was not measured.
        drifts: for each probe how its scores differ from the `first` run's and the `previous` one's.
        rows: the scalars of each probe.
        metrics: the scalars of the set.
        history: the runs so far, this one included.
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

    @property
    def scalars(self) -> dict[str, float]:
        """The set's scalars by their full names, as loggers and `trainer.callback_metrics` have them."""
        return {f"depass/{self.name}/{name}": value for name, value in self.metrics.items()}


def result_of(
    name: str,
    step: int,
    probes: Sequence[ProbePrompt],
    outcomes: Mapping[int, Outcome],
    index: int,
    history: History,
) -> Result:
    """Measure what a source's attributions say.

    Args:
        name: the result's.
        step: the optimiser step.
        probes: the whole set.
        outcomes: what each probe came to, by its index in the set.
        index: which source.
        history: the runs so far, without this one.
    """
    scored = [(probes[i], own) for i, own in sorted(outcomes.items()) if isinstance(own, Finding)]
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
    return Result(name, step, asked, attributions, curves, drifts, rows, metrics, history)


def _scalars(
    probes: Sequence[ProbePrompt], rows: Sequence[Mapping[str, float]], history: History
) -> list[str]:
    """Name the scalars that some probe has, or had; where none was ever measured, those that may come."""
    known = {name for row in rows for name in row} | set(history.curves)
    if not known:
        known = set(SCALARS) - (set() if any(probe.evidence for probe in probes) else {"on_target"})
    return [name for name in SCALARS if name in known]
