"""The prompt as it is shown: segments of its text, each with its component."""

from collections.abc import Iterator
from dataclasses import dataclass

from depass_lightning.reports.numbers import visible
from depass_lightning.results.attribution import Attribution


@dataclass(frozen=True)
class PromptSegment:
    """A part of the prompt that is shown in one colour.

    Attributes:
        space: the leading spaces, which are not coloured, so that the text stays readable.
        text: the rest, with signs for invisible characters; a line break follows the sign of each.
        component: the index of its component; None if it has none.
        end: the token position after it.
    """

    space: str
    text: str
    component: int | None
    end: int


def prompt_segments(attribution: Attribution) -> Iterator[PromptSegment]:
    """Yield the prompt's segments in order: tokens, or the words or spans that are components."""
    owner: dict[int, int] = {}
    for number, span in enumerate(attribution.positions):
        owner |= dict.fromkeys(range(*span) if span else (), number)
    start, count = 0, len(attribution.tokens)
    while start < count:
        component = owner.get(start)
        end = start + 1
        while component is not None and end < count and owner.get(end) == component:
            end += 1
        written = attribution.text_of((start, end))
        bare = written.lstrip(" ") or written
        text = visible(bare).replace("↵", "↵\n") if "\n" in bare else visible(bare)
        yield PromptSegment(written[: len(written) - len(bare)], text, component, end)
        start = end


def prediction_place(attribution: Attribution) -> int:
    """Return the token that the model's prediction is shown after: a masked one, or the last one."""
    masked = attribution.metadata.get("encoder") == "masked"
    return attribution.position if masked else attribution.last


def unread_words(attribution: Attribution) -> str:
    """Return a note on the words of the prompt that the tokenizer does not know; "" if it knows all."""
    words = [visible(word) for word in attribution.metadata.get("unknown_words", ())]
    if not words:
        return ""
    bundled = attribution.metadata.get("model") == "tiny"
    hint = ", so its scores mean little; model=smollm2-135m reads any text" if bundled else ""
    return f"the model's tokenizer does not know {', '.join(map(repr, words))}{hint}"


def full_score(attribution: Attribution) -> float:
    """Return the absolute score that has the full colour: the largest of the components in the text.

    Components outside the text, such as a bias, may be larger than all others together.
    """
    scores = [abs(score) for score in attribution.scores.tolist()]
    placed = [score for score, span in zip(scores, attribution.positions, strict=True) if span is not None]
    return max(placed or scores, default=0.0) or 1.0


def strengths(attribution: Attribution) -> list[float]:
    """Return each component's score relative to the full colour, from -1 to 1."""
    full = full_score(attribution)
    return [min(max(score / full, -1.0), 1.0) for score in attribution.scores.tolist()]
