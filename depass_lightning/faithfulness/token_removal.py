"""Deletion and insertion curves: the answer's probability as the top tokens are removed, or kept alone.

Source: Hong et al., "DePass" (arXiv 2510.18462), section on token-level attribution. For a prompt and its
    answer:

1. Rank the components that represent text by score, the highest first. Special tokens (a leading "<s>") are
   not candidates: they are kept.
2. Deletion (the paper's patch top): remove the first K% of them. Insertion (its recover top): keep only the
   first K%.
3. Encode the remaining tokens as a prompt, and read the answer's probability after its last token. Or keep
   every token and set the embeddings of the removed ones to zero: the prompt keeps its length and positions,
   but the model has never seen such embeddings.

Both are also done in random orders, which every method has to beat: deletion by falling sooner, insertion by
rising sooner.

Comprehensiveness and sufficiency are the corresponding single numbers, over a few small K (DeYoung et al.,
"ERASER", ACL 2020, arXiv 1911.03429, section 4.2, equations 1 to 4).
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from torch import nn

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness.ablated_prompts import AblatedPrompt, AnswerReading, answers_of
from depass_lightning.faithfulness.evaluate import Case, Columns
from depass_lightning.faithfulness.evidence import ablated_prompt, prompt_end, text_components, without_last
from depass_lightning.results.attribution import Attribution

PERCENTS = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
RATIONALES = (1, 5, 10, 20, 50)  # ERASER's

READINGS = {"": "probability", "_logit": "logit", "_log_odds": "log_odds", "_rank": "rank"}
"""What a curve's name ends with, and the field of `AnswerReading` that it follows."""
ZERO_READINGS = ("", "_logit")  # those of curves with embeddings set to zero
RATIONALE_READINGS = ("", "_log_odds")  # those of comprehensiveness and sufficiency

Curve = list[float]


@dataclass(frozen=True)
class RemovalCurves:
    """The answer's probability with K% of a prompt's tokens removed, or only K% kept.

    Every curve follows the answer's probability; the same name with `_logit`, `_log_odds` or `_rank` follows
    another reading of it (`AnswerReading`).

    Attributes:
        percents: each K, from 0 to 100.
        patch_top: with the K% highest scores removed.
        recover_top: with only the K% highest scores kept.
        patch_random: with a random K% removed, the mean over the random orders.
        recover_random: with only a random K% kept, the mean over the same orders.
        zero_patch_top: as `patch_top`, with embeddings set to zero instead; None where not measured, and so
            the others.
        zero_recover_top: as `recover_top`.
        zero_patch_random: as `patch_random`.
        zero_recover_random: as `recover_random`.
        comprehensiveness: how much probability the removal of the highest scores takes, the mean over the
            rationales' sizes; None where not measured, and so the others.
        sufficiency: how much is missing where only the highest scores are kept, the mean over the same.
        comprehensiveness_random: in random orders.
        sufficiency_random: in random orders.
        comprehensiveness_log_odds: in log-odds instead of probability, and so the others.
        sufficiency_log_odds: in log-odds.
        comprehensiveness_random_log_odds: in log-odds, in random orders.
        sufficiency_random_log_odds: in log-odds, in random orders.
    """

    percents: list[float]
    patch_top: Curve
    recover_top: Curve
    patch_random: Curve
    recover_random: Curve
    patch_top_logit: Curve
    recover_top_logit: Curve
    patch_random_logit: Curve
    recover_random_logit: Curve
    patch_top_log_odds: Curve
    recover_top_log_odds: Curve
    patch_random_log_odds: Curve
    recover_random_log_odds: Curve
    patch_top_rank: Curve
    recover_top_rank: Curve
    patch_random_rank: Curve
    recover_random_rank: Curve
    zero_patch_top: Curve | None = None
    zero_recover_top: Curve | None = None
    zero_patch_random: Curve | None = None
    zero_recover_random: Curve | None = None
    zero_patch_top_logit: Curve | None = None
    zero_recover_top_logit: Curve | None = None
    zero_patch_random_logit: Curve | None = None
    zero_recover_random_logit: Curve | None = None
    comprehensiveness: float | None = None
    sufficiency: float | None = None
    comprehensiveness_random: float | None = None
    sufficiency_random: float | None = None
    comprehensiveness_log_odds: float | None = None
    sufficiency_log_odds: float | None = None
    comprehensiveness_random_log_odds: float | None = None
    sufficiency_random_log_odds: float | None = None


def area(percents: Sequence[float], curve: Sequence[float]) -> float:
    """Return the area under a curve (trapezoids) divided by its width: the mean height.

    Args:
        percents: the percentages of the points.
        curve: the curve's value at each point.

    Raises:
        DePassError: there are fewer than two points, or not one value per point.
    """
    if len(percents) < 2 or len(percents) != len(curve):
        raise DePassError(
            f"an area needs at least two points with a value each; got {len(percents)} and {len(curve)}"
        )
    steps = zip(percents[:-1], percents[1:], curve[:-1], curve[1:], strict=True)
    return sum((right - left) * (a + b) / 2 for left, right, a, b in steps) / (percents[-1] - percents[0])


def check_percents(percents: Sequence[float]) -> None:
    """Check that percentages rise.

    Raises:
        DePassError: there are none, one is out of range, or they do not rise.
    """
    rising = all(low < high for low, high in itertools.pairwise(percents))
    if not (percents and rising and percents[0] >= 0 and percents[-1] <= 100):
        raise DePassError(f"percents must rise from 0 at least to 100 at most; got {list(percents)}")


def removal_curves(
    model: nn.Module,
    attributions: Sequence[Attribution],
    answers: Sequence[int | Sequence[int]],
    *,
    percents: Sequence[float] = PERCENTS,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    zeroed: bool = False,
    keep_last: bool = False,
    rationales: Sequence[float] = (),
    progress: bool = False,
) -> list[RemovalCurves]:
    """Measure deletion and insertion curves, and the same in random order, for every attribution.

    Args:
        model: the causal LM that was attributed.
        attributions: the scores, with their prompts' token ids.
        answers: the answer whose probability is read, one per prompt: a token's id, or several.
        percents: the percentages to measure at.
        draws: the number of random orders per prompt; with 0 their curves are empty.
        seed: seed of the random orders, which depend on it and on the prompt alone, not on the batch or the
            process.
        batch_size: how many shortened prompts go through the model together.
        zeroed: measure it with embeddings set to zero, too; that is as many prompts again.
        keep_last: never remove the component that the target's position belongs to. Without its last token a
            prompt asks for something else, so that a curve mostly shows whether a method ranks it first.
        rationales: the K of comprehensiveness and sufficiency, such as `RATIONALES`, each of one token at
            least; none leaves the two out.
        progress: show a progress bar.

    Raises:
        DePassError: percentages are out of range or do not rise, or there is not one answer per prompt.
    """
    check_percents(percents)
    if rationales:
        check_percents(rationales)
    if len(answers) != len(attributions):
        raise DePassError(f"{len(attributions)} attributions need as many answers; got {len(answers)}")
    plans = [
        _Plan(attribution, percents, rationales, draws=draws, seed=seed, zeroed=zeroed, keep_last=keep_last)
        for attribution in attributions
    ]
    prompts = [prompt for plan, answer in zip(plans, answers, strict=True) for prompt in plan.prompts(answer)]
    results = iter(answers_of(model, prompts, batch_size, progress))
    return [plan.read(list(itertools.islice(results, plan.count))) for plan in plans]


@dataclass(frozen=True)
class TokenRemoval:
    """The measure of deletion and insertion curves, for components that represent text: see `removal_curves`.

    Args:
        percents: the percentages to measure at, ascending from 0 to 100.
        draws: the number of random orders per prompt; 0 leaves them out.
        seed: seed of the random orders.
        batch_size: the number of ablated prompts in one pass.
        zeroed: also measure with embeddings set to zero, which doubles the number of passes.
        keep_last: also measure with the last token kept, never a candidate for removal: columns that begin
            with `kept_`, which again takes as many passes.
        rationales: the percentages of comprehensiveness and sufficiency; empty leaves both out.
        progress: show a progress bar.

    Raises:
        DePassError: percentages are out of range or do not rise.
    """

    percents: Sequence[float] = PERCENTS
    draws: int = 1
    seed: int = 0
    batch_size: int = 64
    zeroed: bool = False
    keep_last: bool = False
    rationales: Sequence[float] = RATIONALES
    progress: bool = False

    name = "token removal"
    needs_model = True

    def __post_init__(self) -> None:
        check_percents(self.percents)
        if self.rationales:
            check_percents(self.rationales)

    def columns(self, cases: Sequence[Case], depass: DePass) -> list[Columns]:
        """Return the curves of every case whose components represent text and whose target is a token."""
        columns: list[Columns] = [{} for _ in cases]
        indices = [i for i, case in enumerate(cases) if case.answer_ids and text_components(case.attribution)]
        if not indices:
            return columns
        attributions = [cases[i].attribution for i in indices]
        answers = [cases[i].answer_ids for i in indices]
        for kept in (False, True)[: 1 + self.keep_last]:
            options: dict[str, Any] = asdict(self) | {"keep_last": kept, "zeroed": self.zeroed and not kept}
            curves = removal_curves(depass.model, attributions, answers, **options)
            for i, curve in zip(indices, curves, strict=True):
                known = {name: values for name, values in asdict(curve).items() if values not in (None, [])}
                if kept:
                    del known["percents"]
                columns[i] |= {f"kept_{name}" if kept else name: values for name, values in known.items()}
        return columns


class _Plan:
    """The ablated prompts of one prompt, each once, and the indices of each curve's points among them."""

    def __init__(
        self,
        attribution: Attribution,
        percents: Sequence[float],
        rationales: Sequence[float],
        *,
        draws: int,
        seed: int,
        zeroed: bool,
        keep_last: bool,
    ) -> None:
        self.attribution = attribution
        self.percents = [float(percent) for percent in percents]
        self.zeroed = zeroed
        self.candidates = text_components(attribution)
        if keep_last:
            self.candidates = without_last(attribution, self.candidates)
        self.kept: dict[tuple[int, ...], int] = {}
        ranked = sorted(self.candidates, key=lambda i: -attribution.scores[i].item())
        generator = random.Random(f"{seed} {attribution.token_ids}")
        size = len(self.candidates)
        shuffled = [generator.sample(self.candidates, size) for _ in range(draws)]
        # A random order reversed is as random: the same ablated prompts serve both curves.
        self.orders = {
            "patch_top": ([ranked], False),
            "recover_top": ([ranked], True),
            "patch_random": (shuffled, False),
            "recover_random": ([order[::-1] for order in shuffled], True),
        }
        counts = [round(size * percent / 100) for percent in percents]
        few = [min(max(round(size * percent / 100), 1), size) for percent in rationales]
        self.curves = {name: self._numbers(counts, *order) for name, order in self.orders.items()}
        self.few = {name: self._numbers(few, *order) for name, order in self.orders.items()}
        self.whole = self._number(tuple(range(prompt_end(attribution) + 1))) if rationales else 0

    @property
    def count(self) -> int:
        """The number of ablated prompts."""
        return len(self.kept) * (1 + self.zeroed)

    def prompts(self, answer: int | Sequence[int]) -> list[AblatedPrompt]:
        """Return the ablated prompts, then, where `zeroed`, those with embeddings set to zero."""
        answer = [answer] if isinstance(answer, int) else answer
        prompts = [ablated_prompt(self.attribution, kept, answer) for kept in self.kept]
        if self.zeroed:
            whole = ablated_prompt(self.attribution, range(prompt_end(self.attribution) + 1), answer)
            sets = [set(kept) for kept in self.kept]
            prompts += [replace(whole, seen=[i in kept for i in range(len(whole.ids))]) for kept in sets]
        return prompts

    def read(self, readings: Sequence[AnswerReading]) -> RemovalCurves:
        """Make curves of what the model gives the answers."""
        values: dict[str, Any] = {}
        for prefix, start in (("", 0), ("zero_", len(self.kept)))[: 1 + self.zeroed]:
            rows = readings[start : start + len(self.kept)]
            for suffix, field in READINGS.items():
                if prefix and suffix not in ZERO_READINGS:
                    continue
                column = [getattr(reading, field) for reading in rows]
                for name, orders in self.curves.items():
                    values[f"{prefix}{name}{suffix}"] = _means(orders, column)
                if not prefix and suffix in RATIONALE_READINGS:
                    values |= self._rationales(column, suffix)
        return RemovalCurves(percents=self.percents, **values)

    def _rationales(self, values: Sequence[float], suffix: str) -> dict[str, float]:
        """Return what removing or keeping a few tokens takes from a reading."""
        means = {name: _means(orders, values) for name, orders in self.few.items()}
        names = {
            "patch_top": "comprehensiveness",
            "recover_top": "sufficiency",
            "patch_random": "comprehensiveness_random",
            "recover_random": "sufficiency_random",
        }
        whole = values[self.whole]
        known = {name: column for name, column in names.items() if means[name]}
        return {f"{column}{suffix}": whole - fmean(means[name]) for name, column in known.items()}

    def _numbers(self, counts: list[int], orders: list[list[int]], keep: bool) -> list[list[int]]:
        """Return, for each order, the index of the ablated prompt at each count."""
        return [
            [self._number(self._left(order[:count] if keep else order[count:])) for count in counts]
            for order in orders
        ]

    def _number(self, kept: tuple[int, ...]) -> int:
        return self.kept.setdefault(kept, len(self.kept))

    def _left(self, left: list[int]) -> tuple[int, ...]:
        """Return the positions that are kept: all but those of the candidates that are not left.

        A model needs at least one token: where nothing would be kept, the last token is, in any order.
        """
        removed: set[int] = set()
        for i in set(self.candidates) - set(left):
            removed.update(range(*(self.attribution.positions[i] or (0, 0))))
        last = prompt_end(self.attribution)
        return tuple(i for i in range(last + 1) if i not in removed) or (last,)


def _means(orders: list[list[int]], values: Sequence[float]) -> Curve:
    """Return each point's mean over the orders."""
    return [fmean(values[i] for i in point) for point in zip(*orders, strict=True)]
