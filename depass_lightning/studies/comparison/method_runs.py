"""The paper's comparison of methods on tokens, heads and neurons.

1. Every method scores the same prompts; how long that takes is its cost (`run_method`).
2. Of tokens, the highest and the lowest are removed (patch top, recover top); of heads and neurons they are
   masked. So each method has rows of numbers, one per prompt, in the same order of prompts.
3. A table and curves are made of the rows, with bootstrap 95% CIs. DePass is compared with each other
   method on the same prompts: the interval is that of the difference per prompt (`compare_rows`).

Source: Hong et al., "DePass" (arXiv 2510.18462), the experiments on tokens, heads and neurons.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from depass_lightning.errors import DePassError
from depass_lightning.faithfulness import (
    KEPT_MEASURES,
    MASKED,
    PERCENTS,
    ROW_MEASURES,
    Case,
    ComponentMasking,
    CurveMean,
    Interval,
    Measure,
    TokenRemoval,
    area,
    evaluate,
)
from depass_lightning.faithfulness.circuits import (
    FRACTIONS,
    CircuitValues,
    circuit_scores,
    circuit_values,
)
from depass_lightning.faithfulness.true_ablation import Replacement
from depass_lightning.methods import Method
from depass_lightning.studies.study_result import Cell, Curve, Panel
from depass_lightning.targets import AnswerTarget
from depass_lightning.tasks import Example
from depass_lightning.utils.bootstrap import bootstrap, holm, sign_flip_test

AGAINST = "depass"  # the method that the others are compared with

TOKEN_METHODS = (
    *("depass", "taylor", "half", "shap", "dual", "input_gradient", "gradient_norm", "integrated_gradients"),
    *("gradient_shap", "mean_attention", "last_layer_attention", "attention_rollout", "occlusion", "random"),
)
HEAD_METHODS = ("depass", "taylor", "half", "shap", "dual", "atp", "norm", "random")
MLP_METHODS = ("depass", "taylor", "half", "shap", "dual", "atp", "random")
NEURON_METHODS = ("depass", "taylor", "half", "shap", "dual", "atp", "activation", "norm", "random")

PANELS: dict[str, tuple[str, str, str]] = {
    "patch_top": ("patch top", "tokens removed (%)", "probability of the answer"),
    "recover_top": ("recover top", "tokens kept (%)", "probability of the answer"),
    "patch_top_logit": ("patch top, logit", "tokens removed (%)", "logit of the answer"),
    "recover_top_logit": ("recover top, logit", "tokens kept (%)", "logit of the answer"),
    "kept_patch_top": ("patch top, last kept", "tokens removed (%)", "probability of the answer"),
    "kept_recover_top": ("recover top, last kept", "tokens kept (%)", "probability of the answer"),
    "kept_patch_top_log_odds": ("patch top, last kept, log-odds", "tokens removed (%)", "log-odds"),
    "kept_recover_top_log_odds": ("recover top, last kept, log-odds", "tokens kept (%)", "log-odds"),
    "kept_patch_top_rank": ("patch top, last kept, rank", "tokens removed (%)", "rank of the answer"),
    "kept_recover_top_rank": ("recover top, last kept, rank", "tokens kept (%)", "rank of the answer"),
    "zero_patch_top": ("patch top, zeroed", "embeddings zeroed (%)", "probability of the answer"),
    "zero_recover_top": ("recover top, zeroed", "embeddings kept (%)", "probability of the answer"),
    "mask_top": ("mask top", "masked (%)", "answers right"),
    "mask_bottom": ("mask bottom", "masked (%)", "answers right"),
    "mask_top_probability": ("mask top, probability", "masked (%)", "probability of the answer"),
    "mask_bottom_probability": ("mask bottom, probability", "masked (%)", "probability of the answer"),
}
"""Each curve's column, and how it is drawn."""

NUMBERS = (
    *("comprehensiveness", "sufficiency", "kept_comprehensiveness", "kept_sufficiency"),
    *(f"kept_{name}_log_odds" for name in ("comprehensiveness", "sufficiency")),
    *("lds", "soft_comprehensiveness", "soft_sufficiency"),
    *("evidence_first", "evidence_auroc", "kept_evidence_first", "kept_evidence_auroc"),
    *(
        f"ablation_{replacement}_{number}"
        for replacement in get_args(Replacement)
        for number in ("pearson", "spearman", "top")
    ),
)
"""The columns with a number a prompt."""
ALPHA = 0.05  # the level at which a difference is reported
AT = {"mask_top": (1.0, 5.0), "mask_bottom": (5.0, 20.0)}  # the K whose values the table has


@dataclass(frozen=True)
class MethodRun:
    """The results of one method.

    Attributes:
        rows: one per prompt, with columns of `depass_lightning.storage.ATTRIBUTION_SCHEMA`.
        seconds: the time of scoring all prompts.
    """

    rows: Sequence[Mapping[str, Any]]
    seconds: float


def removal_measures(
    percents: Sequence[float] | None, *, zeroed: bool, keep_last: bool, batch_size: int, progress: bool
) -> list[Measure]:
    """Return the measures of removal: curves of tokens, and masking of heads and neurons.

    Args:
        percents: the percentages to measure at; by default those of `removal_curves` or `masking_curves`.
        zeroed: of tokens, measure with embeddings set to zero too.
        keep_last: of tokens, measure with the last token kept too, and rank evidence among the others.
        batch_size: how many prompts go through the model at once.
        progress: show progress bars.
    """
    # No random orders, because "random" is a method.
    options: dict[str, Any] = {"draws": 0, "batch_size": batch_size, "progress": progress}
    return [
        *(KEPT_MEASURES if keep_last else ()),
        TokenRemoval(percents or PERCENTS, zeroed=zeroed, keep_last=keep_last, **options),
        ComponentMasking(percents or MASKED, **options),
    ]


def run_method(
    method: Method,
    examples: Sequence[Example],
    *,
    target: AnswerTarget = "contrast",
    measures: Sequence[Measure] = (),
    circuits: bool = False,
    batch_size: int = 16,
    progress: bool = False,
) -> MethodRun:
    """Score prompts by a method, and measure the scores.

    Args:
        method: scores tokens, heads or neurons.
        examples: prompts that the model answers right; see `answered_right`.
        target: what is explained of an answer.
        measures: what is measured next to the scores themselves.
        circuits: of heads and neurons, measure circuits of rising size, all others at zero.
        batch_size: how many prompts are scored at once.
        progress: show progress bars.

    Raises:
        DePassError: the method or a measure fails.
    """
    started = time.perf_counter()
    prompts, targets = (
        [example.prompt for example in examples],
        [example.target(target) for example in examples],
    )
    attributions = method.attribute(prompts, targets, batch_size=batch_size, progress=progress)
    seconds = time.perf_counter() - started
    cases = [
        Case(attribution, example.evidence_ranges(), example.answer)
        for attribution, example in zip(attributions, examples, strict=True)
    ]
    measured = evaluate(cases, [*ROW_MEASURES, *measures], method.depass)
    rows = [{"id": example.id, **columns} for example, columns in zip(examples, measured, strict=True)]
    if circuits:
        values = circuit_values(method.depass.decoder, attributions, progress=progress)
        for row, value in zip(rows, values, strict=True):
            row["circuit_values"] = [*value.values, value.whole, value.empty]
    return MethodRun(rows, seconds)


def compare_rows(
    runs: Mapping[str, MethodRun], *, against: str = AGAINST
) -> tuple[list[Panel], list[dict[str, Cell]]]:
    """Make the curves and the table of a comparison.

    Args:
        runs: each method's rows, of the same prompts in the same order.
        against: the method that the others are held against; a column `..._difference` has what it has more
            than each of them, and `..._p` the p-value of no difference, corrected for the number of methods
            (`sign_flip_test`, `holm`).

    Returns:
        A panel for each curve that the rows have, and a row of the table for each method.

    Raises:
        DePassError: rows are missing, or are of other prompts in one method than in another.
    """
    _check(runs, against)
    panels = []
    for column, (name, across, upward) in PANELS.items():
        curves = {method: _curve(column, run.rows) for method, run in runs.items()}
        drawn = {method: curve for method, curve in curves.items() if curve is not None}
        if drawn:
            panels.append(Panel(name, across, upward, drawn))
    numbers = {method: [_numbers(row) for row in run.rows] for method, run in runs.items()}
    columns = list(
        dict.fromkeys(name for method_rows in numbers.values() for row in method_rows for name in row)
    )
    table = []
    for method, run in runs.items():
        row: dict[str, Cell] = {"method": method}
        for column in columns:
            row[column] = _interval(numbers[method], column)
            if method != against:
                differences = _differences(numbers[against], numbers[method], column)
                row[f"{column}_difference"] = bootstrap(differences) if differences else None
                row[f"{column}_p"] = sign_flip_test(differences) if differences else None
        if run.rows[0].get("circuit_values"):
            row |= _circuits(run.rows)
        row["seconds_per_prompt"] = run.seconds / len(run.rows)
        table.append(row)
    for column in columns:
        _correct(table, f"{column}_p")
    return panels, table


def _circuits(rows: Sequence[Mapping[str, Any]]) -> dict[str, Cell]:
    """Return CPR and CMD, which are not means over prompts but of means over them."""
    columns = [row["circuit_values"] for row in rows]
    values = [CircuitValues(FRACTIONS, kept, whole, empty) for *kept, whole, empty in columns]
    scores = circuit_scores(values)
    return {"cpr": scores.cpr, "cmd": scores.cmd}


def _correct(table: Sequence[dict[str, Cell]], column: str) -> None:
    """Correct a column's p-values for their number."""
    rows = [row for row in table if isinstance(row.get(column), float)]
    for row, p in zip(rows, holm([row[column] for row in rows]), strict=True):  # type: ignore[misc]
        row[column] = p


def _check(runs: Mapping[str, MethodRun], against: str) -> None:
    """Check that all methods have rows of the same prompts."""
    if against not in runs:
        raise DePassError(f"there are no rows of {against!r}; there are those of {', '.join(runs) or 'none'}")
    ids = [row.get("id") for row in runs[against].rows]
    if not ids:
        raise DePassError(f"{against} has no rows")
    for method, run in runs.items():
        if [row.get("id") for row in run.rows] != ids:
            raise DePassError(f"{method} has rows of other prompts than {against}, or in another order")


def _curve(column: str, rows: Sequence[Mapping[str, Any]]) -> Curve | None:
    """Return a curve's mean over prompts with its intervals."""
    percents = rows[0].get("masked_percents" if column.startswith("mask") else "percents")
    if percents is None:
        return None
    metric = CurveMean(column, percents, points=True, sync_on_compute=False)
    metric.update(rows)
    mean = metric.compute()
    if mean is None:
        return None
    points = mean.points
    lows, highs = [point.low for point in points], [point.high for point in points]
    return Curve(mean.percents, [point.value for point in points], lows, highs)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return a prompt's numbers: areas, values at some K, and single numbers."""
    measured: dict[str, float] = {}
    for column in PANELS:
        curve = row.get(column)
        if curve is None:
            continue
        percents = row["masked_percents" if column.startswith("mask") else "percents"]
        for percent in AT.get(column, ()):
            if percent in percents:
                measured[f"{column}_{percent:g}%"] = curve[list(percents).index(percent)]
        if len(percents) > 1:
            measured[f"{column}_area"] = area(percents, curve)
    return measured | {name: float(row[name]) for name in NUMBERS if row.get(name) is not None}


def _interval(rows: Sequence[Mapping[str, float]], column: str) -> Interval | None:
    values = [row[column] for row in rows if column in row]
    return bootstrap(values) if values else None


def _differences(
    ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]], column: str
) -> list[float]:
    """Return what one method has more than another, of each prompt where both have it."""
    pairs = zip(ours, theirs, strict=True)
    return [row[column] - other[column] for row, other in pairs if column in row and column in other]


def lower_is_better(measure: str) -> bool:
    """Whether a method is better where a measure of its scores is lower."""
    lower = any(part in measure for part in ("patch_top", "mask_top", "sufficiency"))
    return lower != ("_rank" in measure or "soft_" in measure)


def notes_on(table: Sequence[Mapping[str, Cell]], against: str = AGAINST) -> list[str]:
    """Return how the table is read, and where another method is ahead."""
    notes = [
        f"Intervals are bootstrap 95% CIs over prompts. A difference is {against} less the method, per "
        "prompt; its p-value is that of a sign-flip test, corrected for the number of methods (Holm).",
        "Patch top, mask top and sufficiency are better lower, as are the ranks of recover top; everything "
        "else is better higher.",
    ]
    ahead: dict[str, list[str]] = {}
    for row in table:
        for column, cell in row.items():
            if not column.endswith("_difference") or not isinstance(cell, Interval):
                continue
            measure = column.removesuffix("_difference")
            p = row.get(f"{measure}_p")
            worse = cell.value > 0 if lower_is_better(measure) else cell.value < 0
            if worse and isinstance(p, float) and p < ALPHA:
                ahead.setdefault(measure, []).append(str(row["method"]))
    name = "DePass" if against == AGAINST else against
    notes += [f"Ahead of {name} in {measure}: {', '.join(methods)}." for measure, methods in ahead.items()]
    if not ahead:
        notes.append(f"No method is ahead of {name} at p < {ALPHA} after correction.")
    return notes
