"""The summary of a run: means over its prompts, from one pass over its rows."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torchmetrics import MetricCollection

from depass_lightning.faithfulness.citation_removal import CitationRemoval
from depass_lightning.faithfulness.metrics import CurveMean, CurvesMean, PromptMean, PromptsMean, Rows

CHUNK = 256  # rows in memory at a time

NUMBERS = (
    *("correct", "completeness", "evidence_first", "evidence_chance", "evidence_auroc", "lds"),
    *(f"drop_{count}{suffix}" for count in CitationRemoval.counts for suffix in ("", "_random")),
    *(
        f"{prefix}{name}"
        for prefix in ("", "kept_")
        for name in ("comprehensiveness", "comprehensiveness_random", "sufficiency", "sufficiency_random")
    ),
)
"""The columns with one number per prompt."""

HIGH, LOW = "higher is better", "lower is better"

# The summary's curves: each one's column, that of the random orders, and which end is better.
REMOVAL: dict[str, dict[str, tuple[str, str, str]]] = {
    kind: {
        f"{prefix}patch_top{suffix}": (f"{prefix}patch_top{suffix}", f"{prefix}patch_random{suffix}", LOW),
        f"{prefix}recover_top{suffix}": (
            f"{prefix}recover_top{suffix}",
            f"{prefix}recover_random{suffix}",
            HIGH,
        ),
    }
    for kind, prefix, suffix in (
        ("curves", "", ""),
        ("kept_curves", "kept_", ""),
        ("logit_curves", "", "_logit"),
        ("log_odds_curves", "", "_log_odds"),
        ("kept_log_odds_curves", "kept_", "_log_odds"),
        ("rank_curves", "", "_rank"),
        ("kept_rank_curves", "kept_", "_rank"),
        ("zero_curves", "zero_", ""),
        ("zero_logit_curves", "zero_", "_logit"),
    )
}
MASKING: dict[str, dict[str, tuple[str, str, str]]] = {
    kind: {
        f"mask_top{suffix}": (f"mask_top{suffix}", f"mask_random{suffix}", LOW),
        f"mask_bottom{suffix}": (f"mask_bottom{suffix}", f"mask_random{suffix}", HIGH),
    }
    for kind, suffix in (("masking_curves", ""), ("masking_probability_curves", "_probability"))
}

# Whose areas are numbers of the summary.
WITH_AREA = ("curves", "kept_curves", "zero_curves", "masking_curves")


def removal_metrics(percents: Iterable[float], **options: Any) -> MetricCollection:
    """Return the metrics of deletion and insertion curves, by the names of their columns."""
    return _curve_metrics(REMOVAL, percents, options)


def masking_metrics(percents: Iterable[float], **options: Any) -> MetricCollection:
    """Return the metrics of masked heads or neurons, by the names of their columns."""
    return _curve_metrics(MASKING, percents, options)


def number_metrics(**options: Any) -> MetricCollection:
    """Return the metrics of all single numbers, by the names of their columns."""
    return MetricCollection(
        {column: PromptMean(column, **options) for column in NUMBERS}, compute_groups=False
    )


def _curve_metrics(kinds: Mapping[str, Any], percents: Iterable[float], options: Any) -> MetricCollection:
    columns = {
        column: None
        for curves in kinds.values()
        for ranked, random, _ in curves.values()
        for column in (ranked, random)
    }
    points = list(percents)
    return MetricCollection(
        {column: CurveMean(column, points, **options) for column in columns}, compute_groups=False
    )


def summarise(rows: Rows) -> dict[str, Any]:
    """Return the means over a run's rows, ready for JSON, for a page and for a terminal.

    Args:
        rows: rows of `depass_lightning.storage.ATTRIBUTION_SCHEMA`, read once and in chunks.

    Returns:
        What the rows know of these: `prompts`; `correct`, the share of prompts that the model answers right;
        `completeness_max` and `completeness_mean`; `evidence_first` and `evidence_auroc`, how well scores
        find the known evidence; `lds` and `drop_1`, `drop_3`, `drop_5` of citations; `comprehensiveness` and
        `sufficiency`; the areas under the curves of patch
        top and recover top, with tokens removed, the last one always kept (`kept_`) or embeddings zeroed
        (`zero_`), and of masked heads or neurons; and the mean curves themselves: `curves`, the answer's
        probability at each fraction, `logit_curves`, `log_odds_curves` and `rank_curves`, with the last token
        kept `kept_curves`, `kept_log_odds_curves` and `kept_rank_curves`; `zero_curves`, `zero_logit_curves`,
        `masking_curves` and `masking_probability_curves`. What has a `value` has what it is by `chance` or in
        random order, and its bootstrap 95% CI over prompts, from `low` to `high`.
    """
    # Only one process writes the summary; it must not wait for the others.
    alone: dict[str, Any] = {"sync_on_compute": False}
    metrics = {"numbers": number_metrics(**alone)}
    prompts = 0
    for chunk in _chunks(rows):
        prompts += len(chunk)
        for kind, column, make in (
            ("removal", "percents", removal_metrics),
            ("masking", "masked_percents", masking_metrics),
        ):
            known = next((row[column] for row in chunk if row.get(column) is not None), None)
            if kind not in metrics and known is not None:
                metrics[kind] = make(known, **alone)
        for collection in metrics.values():
            collection.update(chunk)
    if not prompts:
        return {"prompts": 0}
    means = {kind: collection.compute() for kind, collection in metrics.items()}
    summary = {"prompts": prompts, **_numbers(means["numbers"], prompts)}
    for kind, curves in (("removal", REMOVAL), ("masking", MASKING)):
        if kind in means:
            summary |= _areas(means[kind], curves)
    for kind, curves in (("removal", REMOVAL), ("masking", MASKING)):
        if kind in means:
            summary |= _curves(means[kind], curves)
    return summary


def _chunks(rows: Rows) -> Iterator[list[Mapping[str, Any]]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _numbers(means: Mapping[str, PromptsMean | None], prompts: int) -> dict[str, Any]:
    """Return the means of single numbers, each with its value by chance."""
    summary: dict[str, Any] = {}
    if correct := means["correct"]:
        summary["correct"] = correct.value
    if completeness := means["completeness"]:
        summary["completeness_max"] = completeness.highest
        summary["completeness_mean"] = completeness.value
    for name, other, note in (
        ("evidence_first", "evidence_chance", ""),
        ("evidence_auroc", 0.5, ""),
        ("lds", 0.0, HIGH),
        *((f"drop_{count}", f"drop_{count}_random", HIGH) for count in CitationRemoval.counts),
        ("comprehensiveness", "comprehensiveness_random", HIGH),
        ("sufficiency", "sufficiency_random", LOW),
        ("kept_comprehensiveness", "kept_comprehensiveness_random", HIGH),
        ("kept_sufficiency", "kept_sufficiency_random", LOW),
    ):
        mean = means[name]
        if mean is None:
            continue
        chance = other
        if isinstance(other, str):
            random = means[other]
            chance = None if random is None else random.value
        if mean.prompts < prompts:
            note = ", ".join(filter(None, [note, f"known for {mean.prompts} of {prompts} prompts"]))
        summary[name] = _entry(mean, chance, note)
    return summary


def _areas(means: Mapping[str, CurvesMean | None], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the areas under the curves, each with that in random order."""
    summary = {}
    for kind in WITH_AREA:
        for name, (column, other, note) in kinds.get(kind, {}).items():
            mean, random = means[column], means[other]
            if mean is not None and mean.area is not None:
                chance = None if random is None or random.area is None else random.area.value
                summary[f"{name}_area"] = _entry(mean.area, chance, note)
    return summary


def _curves(means: Mapping[str, CurvesMean | None], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean curves, each with that in random order."""
    summary: dict[str, dict[str, Any]] = {}
    for kind, curves in kinds.items():
        for name, (column, other, _) in curves.items():
            mean, random = means[column], means[other]
            if mean is not None:
                fraction = [percent / 100 for percent in mean.percents]
                shown = {} if random is None else {"random": random.mean}
                summary.setdefault(kind, {})[name] = {"fraction": fraction, "depass": mean.mean, **shown}
    return summary


def _entry(interval: PromptsMean, chance: Any, note: str) -> dict[str, Any]:
    entry = {"value": interval.value, "chance": chance, "note": note}
    kept = {key: value for key, value in entry.items() if value is not None and value != ""}
    return {**kept, "low": interval.low, "high": interval.high}
