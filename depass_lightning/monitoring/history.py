"""The probes' scalars at every step, and how far their scores have drifted.

1. Every probe is measured (`measure`).
2. Its scores are compared with those of the first and of the previous run (`History.compare`).
3. The set's scalars are the means over its probes, and the worst completeness (`summarise`); a mean has a
   bootstrap interval over the probes (`intervals`).
4. The null band of a scalar is its first value plus the interval of its mean change on the control prompts
   (`History.null_band`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from depass_lightning.faithfulness import Case, Columns, area, evaluate
from depass_lightning.faithfulness.evaluate import completeness, entropy, on_target, probability, rank, value
from depass_lightning.monitoring.probe_sets import ProbePrompt
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.comparison import Comparison
from depass_lightning.utils.bootstrap import bootstrap

Band = tuple[float, float]
STABLE = 0.05  # the largest rank distance between two runs with stable scores
PROBE_MEASURES = (value, completeness, entropy, probability, rank, on_target)
SCALARS = (
    "value",
    "probability",
    "rank",
    "completeness",
    "on_target",
    "entropy",
    "similarity_first",
    "similarity_previous",
    "spearman_first",
    "spearman_previous",
    "faithfulness",
    "kept_faithfulness",
)


def measure(case: Case, curves: Columns) -> dict[str, float]:
    """Return the scalars of one probe that need no history; those that do not apply are left out.

    Args:
        case: the probe's attribution.
        curves: the columns of `TokenRemoval`; empty if they were not measured.
    """
    (scalars,) = evaluate([case], PROBE_MEASURES)
    for kept in ("", "kept_") if curves else ():
        names = (f"{kept}patch_random", f"{kept}patch_top")
        random, top = (area(curves["percents"], curves[name]) for name in names)
        scalars[f"{kept}faithfulness"] = random - top
    return scalars


def summarise(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Return the mean of every named scalar over the probes that have it, and the worst `completeness`.

    A scalar that no probe has is not-a-number, so that callbacks which monitor it find it.

    Args:
        rows: each probe's scalars.
        names: the scalars.
    """
    summary = {}
    for name in names:
        values = [row[name] for row in rows if name in row] or [math.nan]
        summary[name] = max(values) if name == "completeness" else math.fsum(values) / len(values)
    return summary


def intervals(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return the bootstrap 95% interval over the probes of every named mean that has values.

    Args:
        rows: each probe's scalars.
        names: the scalars.
    """
    ends = {}
    for name in names:
        values = [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]
        if values and name != "completeness":
            interval = bootstrap(values)
            ends[name] = (interval.low, interval.high)
    return ends


def similarities(comparisons: Mapping[str, Comparison]) -> dict[str, float]:
    """Return the scalars of a probe's drift: cosine similarity and rank correlation with each run.

    Args:
        comparisons: the comparisons with earlier runs, by the runs' names.
    """
    cosines = {f"similarity_{name}": comparison.cosine for name, comparison in comparisons.items()}
    return cosines | {f"spearman_{name}": comparison.spearman for name, comparison in comparisons.items()}


class History:
    """The runs of one probe set so far: its curves, and the scores of its first and its previous run.

    Attributes:
        steps: the optimiser steps.
        curves: each scalar at every step.
        intervals: the interval of each mean at every step; None where there is none.
        bands: the null band of each scalar at every step, where there are control prompts.
        circuits: the scores of the circuit's largest edges by step, where circuits are computed.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.curves: dict[str, list[float]] = {}
        self.intervals: dict[str, list[Band | None]] = {}
        self.bands: dict[str, list[Band | None]] = {}
        self.circuits: dict[int, dict[str, float]] = {}
        self._first_rows: dict[str, dict[str, float]] = {}
        self._first: dict[str, dict[str, Any]] = {}
        self._previous: dict[str, dict[str, Any]] = {}

    def compare(self, probe: ProbePrompt, attribution: Attribution) -> dict[str, Comparison]:
        """Compare a probe's scores with those of its first and of its previous run: `first`, `previous`.

        The first run is compared with itself. A probe whose components have changed has no comparison.

        Args:
            probe: the probe.
            attribution: its scores now.
        """
        comparisons = {}
        for name, run in (("first", self._first), ("previous", self._previous)):
            before = run.get(probe.id)
            if before is None:
                comparisons[name] = attribution.compare(attribution)
            elif before["names"] == attribution.names:
                comparisons[name] = replace(attribution, scores=before["scores"]).compare(attribution)
        return comparisons

    def changes(self, name: str, rows: Mapping[str, Mapping[str, float]]) -> list[float]:
        """Return each probe's change of a scalar since its first run.

        Args:
            name: the scalar.
            rows: the scalars of each probe now, by the probes' ids.
        """
        pairs = [(row.get(name), self._first_rows.get(id, row).get(name)) for id, row in rows.items()]
        changes = [now - first for now, first in pairs if now is not None and first is not None]
        return [change for change in changes if math.isfinite(change)]

    def null_band(
        self, metrics: Mapping[str, float], changes: Mapping[str, Sequence[float]]
    ) -> dict[str, Band]:
        """Return each scalar's null band: the values that the changes on the control prompts explain.

        It is the first run's value plus the bootstrap 95% interval of the mean change.

        Args:
            metrics: the set's scalars in this run, which are the first ones in a first run.
            changes: the control prompts' changes of each scalar.
        """
        bands = {}
        for name, values in changes.items():
            curve = (*self.curves.get(name, ()), metrics.get(name, math.nan))
            start = next((value for value in curve if math.isfinite(value)), None)
            if start is not None and values:
                mean = bootstrap(values)
                bands[name] = (start + min(0.0, mean.low), start + max(0.0, mean.high))
        return bands

    def add(
        self,
        step: int,
        metrics: Mapping[str, float],
        scored: Mapping[str, Attribution],
        rows: Mapping[str, Mapping[str, float]],
        bands: Mapping[str, Band],
        edges: Mapping[str, float] | None = None,
    ) -> None:
        """Append one run.

        Args:
            step: the optimiser step.
            metrics: the set's scalars.
            scored: the attributions of the probes that succeeded, by their ids.
            rows: the scalars of these probes, by their ids.
            bands: the null bands of the scalars.
            edges: the largest edges of the circuit.
        """
        ends = intervals(list(rows.values()), list(metrics))
        kinds: list[tuple[dict[str, Any], Mapping[str, Any], Any]] = [
            (self.curves, metrics, math.nan),
            (self.intervals, ends, None),
            (self.bands, bands, None),
        ]
        for curves, now, missing in kinds:
            for name in dict.fromkeys((*curves, *now)):
                curves.setdefault(name, [missing] * len(self.steps)).append(now.get(name, missing))
        self.steps.append(step)
        if edges:
            self.circuits[step] = dict(edges)
        self._first_rows = {id: dict(row) for id, row in rows.items()} | self._first_rows
        scores = {id: {"names": list(a.names), "scores": a.scores.clone()} for id, a in scored.items()}
        self._previous.update(scores)
        self._first = scores | self._first

    def as_json(self) -> dict[str, Any]:
        """Return steps and curves for JSON, with null where a value is not a number."""
        curves = {
            name: [value if math.isfinite(value) else None for value in curve]
            for name, curve in self.curves.items()
        }
        return {
            "steps": self.steps,
            "curves": curves,
            "intervals": self.intervals,
            "null_bands": self.bands,
            "stable_from": self.stable_from(),
            "circuits": self.circuits,
        }

    def stable_from(self, threshold: float = STABLE) -> int | None:
        """Return the step from which the ranks of the scores are stable.

        From there on the rank distance of a run to the previous one, `1 - Spearman`, averaged over the
        probes, stays below a threshold. Source: RSP, rank stability between checkpoints (arXiv 2601.11625).

        Args:
            threshold: the largest distance.

        Returns:
            The step; None if the last distance is not below it, or there is none.
        """
        stable = None
        pairs = zip(self.steps, self.curves.get("spearman_previous", ()), strict=False)
        for step, spearman in list(pairs)[1:]:  # the first run is compared with itself
            if not 1 - spearman < threshold:
                stable = None
            elif stable is None:
                stable = step
        return stable

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain containers and tensors."""
        curves = {name: list(curve) for name, curve in self.curves.items()}
        runs = {"first": dict(self._first), "previous": dict(self._previous), "rows": dict(self._first_rows)}
        ranges = {"intervals": self.intervals, "bands": self.bands}
        lists = {key: {name: list(band) for name, band in kind.items()} for key, kind in ranges.items()}
        circuits = {step: dict(edges) for step, edges in self.circuits.items()}
        return {"steps": list(self.steps), "curves": curves, **runs, **lists, "circuits": circuits}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "History":
        """Return the history of a state.

        Args:
            state: a result of `state_dict`.
        """
        history = cls()
        history.steps = list(state["steps"])
        history.curves = {name: list(curve) for name, curve in state["curves"].items()}
        history.intervals = {name: list(ends) for name, ends in state["intervals"].items()}
        history.bands = {name: list(ends) for name, ends in state["bands"].items()}
        history._first, history._previous = dict(state["first"]), dict(state["previous"])
        history._first_rows = dict(state["rows"])
        history.circuits = {step: dict(edges) for step, edges in state["circuits"].items()}
        return history
