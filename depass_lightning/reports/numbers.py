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
ERROR_WORDS = frozenset(("completeness", "error"))

MEASURES = {
    "correct": "model is right",
    "completeness": "completeness error",
    "completeness_max": "completeness error, largest",
    "completeness_mean": "completeness error, mean",
    "evidence_auroc": "evidence AUROC",
    "evidence_first": "evidence ranked first",
    "lds": "linear datamodeling score",
    **{f"drop_{count}": f"log-probability lost without the top {count}" for count in (1, 3, 5)},
    "on_target": "score on the evidence",
    "seconds_per_prompt": "seconds per prompt",
}
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
    """

    label: str
    value: str
    note: str = ""


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
    cards = []
    for key, entry in summary.items():
        parts = entry if isinstance(entry, Mapping) else {"value": entry}
        value = parts.get("value")
        if not isinstance(value, int | float):
            continue
        notes = []
        if parts.get("low") is not None:
            notes.append(f"{_amount(key, parts['low'])} to {_amount(key, parts['high'])}")
        if parts.get("chance") is not None:
            notes.append(f"at random {_amount(key, parts['chance'])}")
        if parts.get("note"):
            notes.append(str(parts["note"]))
        cards.append(Card(measure_name(key), _amount(key, value), ", ".join(notes)))
    return cards


def _amount(key: str, value: float) -> str:
    """Write one value of a summary in the unit that follows from its name."""
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
