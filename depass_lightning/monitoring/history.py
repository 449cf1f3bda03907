"""The probes' scalars at every step, and how far their scores have drifted.

1. Every probe is measured (`measure`).
2. Its scores are compared with those of the first and of the previous run (`History.compare`).
3. The set's scalars are the means over its probes, and the worst completeness (`summarise`).
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
)


def measure(case: Case, curves: Columns) -> dict[str, float]:
    """Return the scalars of one probe that need no history; those that do not apply are left out.

    Args:
        case: the probe's attribution.
        curves: the columns of `TokenRemoval`; empty if they were not measured.
    """
    (scalars,) = evaluate([case], PROBE_MEASURES)
    if curves:
        random, top = (area(curves["percents"], curves[name]) for name in ("patch_random", "patch_top"))
        scalars["faithfulness"] = random - top
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


def similarities(comparisons: Mapping[str, Comparison]) -> dict[str, float]:
    """Return the scalars of a probe's drift: cosine similarity and rank correlation with each run.

    Args:
        comparisons: the comparisons with earlier runs, by the runs' names.
    """
    cosines = {f"similarity_{name}": comparison.cosine for name, comparison in comparisons.items()}
    return cosines | {f"spearman_{name}": comparison.spearman for name, comparison in comparisons.items()}


class History:
    """The runs of one probe set so far: its curves, and the scores of its first and its previous run."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.curves: dict[str, list[float]] = {}
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

    def add(self, step: int, metrics: Mapping[str, float], scored: Mapping[str, Attribution]) -> None:
        """Append one run.

        Args:
            step: the optimiser step.
            metrics: the set's scalars.
            scored: the attributions of the probes that succeeded, by their ids.
        """
        for name in dict.fromkeys((*self.curves, *metrics)):
            curve = self.curves.setdefault(name, [math.nan] * len(self.steps))
            curve.append(metrics.get(name, math.nan))
        self.steps.append(step)
        scores = {id: {"names": list(a.names), "scores": a.scores.clone()} for id, a in scored.items()}
        self._previous.update(scores)
        self._first = scores | self._first

    def as_json(self) -> dict[str, Any]:
        """Return steps and curves for JSON, with null where a value is not a number."""
        curves = {
            name: [value if math.isfinite(value) else None for value in curve]
            for name, curve in self.curves.items()
        }
        return {"steps": self.steps, "curves": curves}

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain containers and tensors."""
        curves = {name: list(curve) for name, curve in self.curves.items()}
        runs = {"first": dict(self._first), "previous": dict(self._previous)}
        return {"steps": list(self.steps), "curves": curves, **runs}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "History":
        """Return the history of a state.

        Args:
            state: a result of `state_dict`.
        """
        history = cls()
        history.steps = list(state["steps"])
        history.curves = {name: list(curve) for name, curve in state["curves"].items()}
        history._first, history._previous = dict(state["first"]), dict(state["previous"])
        return history
