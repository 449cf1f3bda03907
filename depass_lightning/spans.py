"""A prompt's tokens grouped into words, sentences, paragraphs, chat turns or given ranges."""

import re
from collections.abc import Sequence
from typing import Literal, get_args

from depass_lightning.errors import DePassError
from depass_lightning.prompts import Prompt
from depass_lightning.words import word_tokens

Unit = Literal["word", "sentence", "paragraph", "turn"]

_ENDS = {
    # A sentence ends behind its closing marks; Chinese, Japanese and Hindi have marks of their own.
    "sentence": re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？।]+|\n+"),
    "paragraph": re.compile(r"\n\s*\n"),
    # Chat templates open every turn by a token of their own.
    "turn": re.compile(
        r"(?=<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|user\|>|<\|assistant\|>)"
    ),
}


def segment(
    prompt: Prompt, by: Unit | Sequence[tuple[int, int]], unit: Literal["character", "token"]
) -> list[list[int]]:
    """Group positions; the first stands alone, and what given ranges leave out comes last.

    Args:
        prompt: the prompt.
        by: what makes a group: a kind of text, or ranges.
        unit: what given ranges count.

    Raises:
        DePassError: the kind is unknown, the text or the tokens' offsets are not known, or ranges overlap,
            are empty or out of range.
    """
    groups = _by_text(prompt, by) if isinstance(by, str) else _by_ranges(prompt, by, unit)
    alone = [[position for position in group if position > 0] for group in groups]
    covered = {position for group in alone for position in group}
    rest = [position for position in range(1, len(prompt.ids)) if position not in covered]
    return [[0], *(group for group in [*alone, rest] if group)]


def _by_text(prompt: Prompt, by: str) -> list[list[int]]:
    if by not in get_args(Unit):
        raise DePassError(f"Spans({by!r}): choose one of {', '.join(get_args(Unit))}, or give ranges")
    if prompt.offsets is None or not prompt.text:
        raise DePassError(
            f"Spans({by!r}): {prompt.name} has no text to find its tokens in; give ranges of tokens"
        )
    if by == "word":
        numbers = word_tokens(prompt.text, prompt.offsets)
        return [[i for i, own in enumerate(numbers) if own == number] for number in sorted(set(numbers))]
    ends = [match.end() for match in _ENDS[by].finditer(prompt.text)]
    groups: list[list[int]] = [[] for _ in range(len(ends) + 1)]
    for position, (start, end) in enumerate(prompt.offsets):
        # A token belongs where its own first visible character stands.
        own = prompt.text[start:end]
        at = start + len(own) - len(own.lstrip()) if own.strip() else start
        groups[sum(at >= border for border in ends)].append(position)
    return [group for group in groups if group]


def _by_ranges(
    prompt: Prompt, ranges: Sequence[tuple[int, int]], unit: Literal["character", "token"]
) -> list[list[int]]:
    groups = []
    taken: dict[int, tuple[int, int]] = {}
    for start, end in ranges:
        if unit == "token":
            inside = list(range(start, end)) if 0 <= start < end <= len(prompt.ids) else []
        elif prompt.offsets is None:
            raise DePassError(f"Spans: {prompt.name} has no text; give ranges of tokens by unit='token'")
        else:
            inside = [i for i, (first, last) in enumerate(prompt.offsets) if first < end and last > start]
        if not inside:
            raise DePassError(f"Spans: the range {(start, end)} covers no token of {prompt.name}")
        for position in inside:
            if position in taken:
                raise DePassError(f"Spans: the ranges {taken[position]} and {(start, end)} share a token")
            taken[position] = (start, end)
        groups.append(inside)
    return groups
