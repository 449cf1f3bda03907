"""The prompt as it is shown: piece by piece, each with the component that stands for it."""

from collections.abc import Iterator
from dataclasses import dataclass

from depass_lightning.reports.numbers import visible
from depass_lightning.results.attribution import Attribution


@dataclass(frozen=True)
class Piece:
    """A stretch of the prompt that is shown in one colour.

    Attributes:
        space: the spaces before it, which stay without colour so that the text reads as a text.
        text: the rest, with signs for what has no look of its own; behind every line's end it really ends.
        component: the number of the component that stands for it, if one does.
        end: the token position behind it.
    """

    space: str
    text: str
    component: int | None
    end: int


def pieces_of(attribution: Attribution) -> Iterator[Piece]:
    """Yield the prompt's pieces in order: tokens, or the words or spans that components stand for."""
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
        yield Piece(written[: len(written) - len(bare)], text, component, end)
        start = end


def unread_words(attribution: Attribution) -> str:
    """Say which words of the prompt the model's tokenizer does not know; "" where it knows all."""
    words = [visible(word) for word in attribution.metadata.get("unknown_words", ())]
    return f"the model's tokenizer does not know {', '.join(map(repr, words))}" if words else ""


def full_score(attribution: Attribution) -> float:
    """Return the size of the score that has the full colour: the largest of what stands in the text.

    What stands at no place in the text, such as a bias, may be larger than all the rest together.
    """
    scores = [abs(score) for score in attribution.scores.tolist()]
    placed = [score for score, span in zip(scores, attribution.positions, strict=True) if span is not None]
    return max(placed or scores, default=0.0) or 1.0


def strengths(attribution: Attribution) -> list[float]:
    """Return each component's score relative to the one with the full colour, from -1 to 1."""
    full = full_score(attribution)
    return [min(max(score / full, -1.0), 1.0) for score in attribution.scores.tolist()]
