"""Attributions, and what is known about their prompts → columns of measures.

A measure has a name, states whether it runs the model, and returns the columns of every case; a case that it
does not apply to gets none. Measures of the scores alone are functions of a case, below. Those that run the
model are classes with their options: `TokenRemoval` (token_removal.py), `ComponentMasking`
(component_masking.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from typing_extensions import override

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness.evidence import Evidence, answer_tokens, evidence_found, text_components
from depass_lightning.results.attribution import Attribution

Columns = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An attribution, and what is known about its prompt.

    Args:
        attribution: the scores.
        evidence_ranges: the character ranges `[start, end)` of the evidence; empty where it is not known.
        answer: the right continuation, with its leading space; None for the explained token.
    """

    attribution: Attribution
    evidence_ranges: Sequence[tuple[int, int]] = ()
    answer: str | None = None

    @property
    def target_ids(self) -> list[int]:
        """The ids of the explained tokens, the answer first; empty for a direction or a probe's logit."""
        return self.attribution.target_ids

    @property
    def answer_ids(self) -> list[int]:
        """The ids of the explained answer's tokens; empty for a direction or a probe's logit."""
        return answer_tokens(self.attribution)

    @cached_property
    def evidence(self) -> Evidence | None:
        """How the scores rank the evidence; None where it is not known."""
        return evidence_found(self.attribution, self.evidence_ranges)

    @cached_property
    def kept_evidence(self) -> Evidence | None:
        """The same with the last token no candidate."""
        return evidence_found(self.attribution, self.evidence_ranges, keep_last=True)


class Measure(Protocol):
    """A measure of attributions."""

    @property
    def name(self) -> str:
        """What error messages call it."""
        ...

    @property
    def needs_model(self) -> bool:
        """Whether it runs the model."""
        ...

    def columns(self, cases: Sequence[Case], depass: Any) -> list[Columns]:
        """Return the columns of every case, empty for a case that the measure does not apply to.

        Args:
            cases: the attributions, and what is known about their prompts.
            depass: the model that was attributed; None where the measure does not need it.
        """
        ...


@dataclass(frozen=True)
class ScoreMeasure(Measure):
    """A measure that needs the scores alone: one column, named after the function.

    Args:
        function: takes a case; returns None where the measure does not apply.
    """

    function: Callable[[Case], float | bool | None]

    @property
    def needs_model(self) -> bool:
        """It does not run the model."""
        return False

    @property
    def name(self) -> str:
        """The column."""
        return self.function.__name__

    def __call__(self, case: Case) -> float | bool | None:
        """Return the measure of one case."""
        return self.function(case)

    @override
    def columns(self, cases: Sequence[Case], depass: object = None) -> list[Columns]:
        values = map(self.function, cases)
        return [{} if value is None else {self.name: value} for value in values]


def evaluate(
    cases: Sequence[Case], measures: Sequence[Measure], depass: DePass | None = None
) -> list[Columns]:
    """Measure attributions.

    Args:
        cases: the attributions, and what is known about their prompts.
        measures: what to measure.
        depass: the model that was attributed; None is enough for measures of the scores alone.

    Returns:
        Each case's columns, without those of measures that do not apply to it.

    Raises:
        DePassError: a measure needs the model, and there is none.
    """
    if depass is None and (needing := [measure.name for measure in measures if measure.needs_model]):
        raise DePassError(f"{needing[0]} runs the model; pass depass= to evaluate")
    rows: list[Columns] = [{} for _ in cases]
    for measure in measures:
        for row, columns in zip(rows, measure.columns(cases, depass), strict=True):
            row |= columns
    return rows


@ScoreMeasure
def value(case: Case) -> float:
    """The model's value of the target."""
    return case.attribution.value


@ScoreMeasure
def probability(case: Case) -> float | None:
    """The model's probability of the target's token."""
    return case.attribution.probability


@ScoreMeasure
def rank(case: Case) -> float | None:
    """The rank of the target's token, from 1 for the most likely."""
    return None if case.attribution.rank is None else float(case.attribution.rank)


@ScoreMeasure
def correct(case: Case) -> bool | None:
    """Whether the target's token is the most likely one."""
    return case.attribution.correct


@ScoreMeasure
def completeness(case: Case) -> float:
    """The completeness error: how far the scores are from summing to the value, relative to it."""
    return case.attribution.completeness


@ScoreMeasure
def entropy(case: Case) -> float:
    """The entropy, in nats, of the distribution of the scores' absolute values over the components.

    0 where one component has everything; the logarithm of their number where all have the same.
    """
    size = case.attribution.scores.double().abs()
    shares = size / size.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.entr(shares).sum().item()


@ScoreMeasure
def on_target(case: Case) -> float | None:
    """The fraction of the positive scores that the evidence has."""
    attribution = case.attribution
    if not case.evidence_ranges or attribution.offsets is None or not text_components(attribution):
        return None
    return attribution.positive_fraction(case.evidence_ranges)


@ScoreMeasure
def evidence_first(case: Case) -> bool | None:
    """Evidence ranked first: whether the component with the highest score is evidence."""
    return None if case.evidence is None else case.evidence.first


@ScoreMeasure
def evidence_chance(case: Case) -> float | None:
    """How often a random order ranks evidence first."""
    return None if case.evidence is None else case.evidence.chance


@ScoreMeasure
def evidence_auroc(case: Case) -> float | None:
    """How often a component that is evidence scores higher than one that is not."""
    return None if case.evidence is None else case.evidence.auroc


@ScoreMeasure
def kept_evidence_first(case: Case) -> float | None:
    """Evidence ranked first among all tokens but the last."""
    return None if case.kept_evidence is None else float(case.kept_evidence.first)


@ScoreMeasure
def kept_evidence_auroc(case: Case) -> float | None:
    """As `evidence_auroc`, among all tokens but the last."""
    return None if case.kept_evidence is None else case.kept_evidence.auroc


ROW_MEASURES: tuple[Measure, ...] = (correct, completeness, evidence_first, evidence_chance, evidence_auroc)
"""What the rows of an analysis and of a comparison hold, besides measures that run the model."""
KEPT_MEASURES: tuple[Measure, ...] = (kept_evidence_first, kept_evidence_auroc)
"""What the rows of a comparison hold where the last token is kept."""
