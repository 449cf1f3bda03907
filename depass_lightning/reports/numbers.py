"""How numbers, measures and the characters of a token are written for a reader."""

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

PERCENT_WORDS = frozenset(
    ["accuracy", "chance", "correct", "evidence", "first", "hit", "on", "probability", "rate", "share"]
)
LOWER = "lower is better"
ERROR_WORDS = frozenset(("completeness", "error"))

MEASURES = {
    "correct": "model is right",
    "completeness": "completeness error",
    "completeness_max": "completeness error, largest",
    "completeness_mean": "completeness error, mean",
    "evidence_auroc": "evidence AUROC",
    "cmd": "CMD",
    "cpr": "CPR",
    "evidence_first": "evidence ranked first",
    "lds": "linear datamodeling score",
    **{f"drop_{count}": f"log-probability lost without the top {count}" for count in (1, 3, 5)},
    "on_target": "score on the evidence",
    "pearson": "Pearson",
    "seconds_per_prompt": "seconds per prompt",
    "spearman": "Spearman",
}
DEFINITIONS = {
    "correct": "The fraction of the prompts whose right answer is the model's most likely next token.",
    "completeness_max": "How far the scores are from summing to the value, relative to it: rounding only.",
    "evidence_first": "The fraction of the prompts whose highest score belongs to evidence: a part of the "
    "prompt that the answer relies on, according to the task.",
    "patch_top_area": "The area under the answer's probability as the top-scored tokens are removed.",
    "recover_top_area": "The area under the answer's probability as only the top tokens are kept.",
    "mask_top_area": "The area under the accuracy as the components with the highest scores are set to zero.",
    "comprehensiveness": "How much of the answer's probability is lost without the top tokens.",
    "sufficiency": "How much of the answer's probability is lost with the top tokens alone.",
}
LEADING = ("evidence_first", "patch_top_area", "mask_top_area", "correct", "completeness_max")
"""Measures that a page shows first where they are known: at most `CARDS` of them."""
CARDS = 3
PREFIXES = {"kept_": "last token kept", "zero_": "embeddings zeroed"}

# Invisible characters that change the direction of the text around them.
TURNING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")


def plain(number: float) -> str:
    """Write a number with three significant digits and a real minus sign: 0.0213, 3.81, 12,400, 6.1e−8."""
    if not math.isfinite(number):
        return "not a number" if math.isnan(number) else "∞" if number > 0 else "−∞"
    size = abs(number)
    if size >= 1e9 or 0 < size < 1e-3:
        digits, exponent = f"{number:.1e}".split("e")
        written = f"{digits.removesuffix('.0')}e{int(exponent)}"
    elif size >= 1000:
        written = f"{number:,.0f}"
    else:
        before = math.floor(math.log10(size)) if size else 0
        written = f"{number:.{min(max(2 - before, 0), 4)}f}"
        written = written.rstrip("0").rstrip(".") if size in (0, round(size)) else written
    return written.replace("-", "−")


def signed(number: float) -> str:
    """Write a number as `plain` does, with its sign also where it is positive."""
    return f"+{plain(number)}" if number > 0 else plain(number)


def percent(fraction: float) -> str:
    """Write a fraction in percent: 71.2%, 100%, <0.1%."""
    if not math.isfinite(fraction):
        return plain(fraction)
    if 0 < fraction < 0.001:
        return "<0.1%"
    return f"{fraction:.1%}".replace(".0%", "%")


def ordinal(rank: int) -> str:
    """Write a rank as an ordinal number: first, 2nd, 48th."""
    if rank == 1:
        return "first"
    ending = "th" if rank % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{rank:,}{ending}"


def visible(text: str) -> str:
    """Write invisible characters as signs: ↵ for a line break, ⇥ for a tab.

    Control characters become their pictures (␛), so that no token can control a terminal; spaces alone become
    ␣, and characters that change the text's direction become �.
    """
    if text and not text.strip(" "):
        return "␣" * len(text)
    return "".join(_visible(character) for character in text)


def bare(name: str) -> str:
    """Return a token's text without its leading space; spaces alone are returned unchanged."""
    return name.strip(" ") or name


def _visible(character: str) -> str:
    if character in "\n\t":
        return "↵" if character == "\n" else "⇥"
    category = unicodedata.category(character)
    if category == "Cc":
        point = ord(character)
        return chr(0x2400 + point) if point < 0x20 else "␡"
    return "�" if category == "Cs" or character in TURNING else character


def measure_name(key: str) -> str:
    """Return a measure's name for a reader, the same on pages, in figures and in the terminal.

    Args:
        key: the measure's name in a summary or in a run's columns: `evidence_first`, `patch_top_area`.
    """
    for prefix, note in PREFIXES.items():
        if key.startswith(prefix):
            return f"{measure_name(key.removeprefix(prefix))}, {note}"
    curve = key.replace("patch_top", "deletion_curve").replace("recover_top", "insertion_curve")
    return MEASURES.get(key, curve.replace("_", " "))


@dataclass(frozen=True)
class Card:
    """One number of a run as text.

    Attributes:
        label: the measure's name.
        value: the number.
        note: its interval and its chance level; "" without either.
        definition: what the measure is, in a sentence; "" where its name is enough.
        leading: whether a page shows it first.
        random: whether its interval includes the chance level, or is on the wrong side of it.
    """

    label: str
    value: str
    note: str = ""
    definition: str = ""
    leading: bool = False
    random: bool = False


def curves_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the curves of a run's summary by name, one per panel.

    Args:
        summary: see `summary_cards`.
    """
    kinds = ("curves", "kept_curves", "masking_curves")
    return {name: curve for kind in kinds for name, curve in (summary.get(kind) or {}).items()}


def summary_cards(summary: Mapping[str, Any]) -> list[Card]:
    """Write the numbers of a run's summary for a reader.

    Args:
        summary: values by name. A value is a number, a boolean, or a mapping with the `value` and optionally
            its value by `chance`, the ends of its interval, `low` and `high`, and a `note`. Everything else
            (texts, lists, curves, settings) is left out.
    """
    leading = [key for key in LEADING if key in summary][:CARDS]
    cards = []
    for key, entry in summary.items():
        parts = entry if isinstance(entry, Mapping) else {"value": entry}
        value = parts.get("value")
        if not isinstance(value, int | float):
            continue
        notes = []
        random = no_better_than_random(parts)
        if random:
            notes.append("no better than random")
        if parts.get("low") is not None and parts["low"] < parts["high"]:
            notes.append(f"{amount(key, parts['low'])} to {amount(key, parts['high'])}")
        if parts.get("chance") is not None:
            notes.append(f"at random {amount(key, parts['chance'])}")
        if parts.get("note"):
            notes.append(str(parts["note"]))
        written = (measure_name(key), amount(key, value), ", ".join(notes), DEFINITIONS.get(key, ""))
        cards.append(Card(*written, leading=key in leading, random=random))
    return cards


def no_better_than_random(entry: Mapping[str, Any]) -> bool:
    """Return whether a number's confidence interval includes its chance level, or is on the wrong side of it.

    Args:
        entry: the number's `value`, `chance`, `low`, `high` and `note`; without an interval it is not judged.
    """
    chance, low, high = (entry.get(key) for key in ("chance", "low", "high"))
    if chance is None or low is None or high is None or low == high:
        return False
    return high >= chance if LOWER in str(entry.get("note", "")) else low <= chance


def amount(key: str, value: float) -> str:
    """Write one value of a summary in the unit that follows from its name.

    Args:
        key: the measure's name.
        value: its value.
    """
    words = set(key.lower().split("_"))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if words & ERROR_WORDS:
        return plain(value)
    if words & PERCENT_WORDS and 0 <= value <= 1:
        return percent(value)
    return f"{plain(value)} s" if "seconds" in words else plain(value)


def model_name(name: str) -> str:
    """Return a model's name; for an absolute path its last part."""
    return PurePath(name).name if PurePath(name).is_absolute() else name
