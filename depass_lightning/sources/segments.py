"""A prompt's tokens grouped into words, sentences, paragraphs, turns, documents or given ranges."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from numbers import Integral
from typing import Literal, cast, get_args

from depass_lightning.errors import DePassError
from depass_lightning.prompts import Prompt
from depass_lightning.utils.sections import ENDS, SectionUnit, first_visible, parts, tokens_of
from depass_lightning.utils.words import word_tokens

Unit = Literal["word"] | SectionUnit
UNITS = ("word", *get_args(SectionUnit))

# Where a chat template begins a turn, in a text whose messages are not known.
_OPENS = re.compile(
    r"<[|｜](?:im_start|im_user|im_system|im_assistant"  # ChatML, and Kimi's
    r"|start_header_id|header_start"  # Llama 3, Llama 4
    r"|start_of_role|START_OF_TURN_TOKEN|start"  # Granite, Command R, harmony of gpt-oss
    # Phi, Zephyr, GLM, DeepSeek, Apertus
    r"|(?:system|user|assistant|tool|developer|observation)(?:_start)?)[|｜]>"
    r"|<start_of_turn>|<\|turn>"  # Gemma, Gemma 4
    r"|\[\|(?:system|user|assistant|tool)\|\]"  # EXAONE
    r"|(?:<s>\s*)?\[INST\]"  # Llama 2, Mistral
    r"|(?:<s>\s*)?\[(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]",  # Mistral
    re.IGNORECASE,
)
# Where one ends and the next speaker begins without a marker.
_CLOSES = re.compile(r"\[/INST\]|<</SYS>>|\[/(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS)\]")


def segment(
    prompt: Prompt, by: Unit | Sequence[tuple[int, int]], unit: Literal["character", "token"]
) -> list[list[int]]:
    """Group positions: the first one alone, then the groups, then all that ranges leave out.

    No group spans a prompt and its answer: a unit of text ends where the answer begins, and what ranges leave
    out of the answer is a group of its own.

    Args:
        prompt: the prompt.
        by: a unit of text, or ranges.
        unit: what the ranges count.

    Raises:
        DePassError: the unit of text, the text or the tokens' offsets are not known, the prompt has no marker
            of turns, or ranges overlap, are empty or out of range.
    """
    groups = _by_text(prompt, by) if isinstance(by, str) else _by_ranges(prompt, by, unit)
    alone = [[position for position in group if position > 0] for group in groups]
    covered = {position for group in alone for position in group}
    rest = [position for position in range(1, len(prompt.ids)) if position not in covered]
    start = len(prompt.ids) if prompt.answer_start is None else prompt.answer_start
    split = [
        [position for position in group if (position >= start) == in_answer]
        for group in [*alone, rest]
        for in_answer in (False, True)
    ]
    return [[0], *(group for group in split if group)]


def _by_text(prompt: Prompt, by: str) -> list[list[int]]:
    if by not in UNITS:
        raise DePassError(f"Spans({by!r}): choose one of {', '.join(UNITS)}, or give ranges")
    if prompt.offsets is None or not prompt.text:
        raise DePassError(
            f"Spans({by!r}): {prompt.name} has no text to find its tokens in; give ranges of tokens"
        )
    if by == "word":
        numbers = word_tokens(prompt.text, prompt.offsets)
        return [[i for i, word in enumerate(numbers) if word == number] for number in sorted(set(numbers))]
    if prompt.sections:
        inside = parts(prompt.text, prompt.sections, cast(SectionUnit, by))
        return [tokens for tokens in tokens_of(inside, prompt.text, prompt.offsets) if tokens]
    if by == "document":
        raise DePassError(
            f"Spans('document'): {prompt.name} has no documents; pass Documents([...], question)"
        )
    borders = _turns(prompt) if by == "turn" else [match.end() for match in ENDS[by].finditer(prompt.text)]
    groups: list[list[int]] = [[] for _ in range(len(borders) + 1)]
    for position, span in enumerate(prompt.offsets):
        groups[bisect_right(borders, first_visible(prompt.text, span))].append(position)
    return [group for group in groups if group]


def _turns(prompt: Prompt) -> list[int]:
    """Return the characters at which turns begin."""
    text = prompt.text
    begins = {match.start() for match in _OPENS.finditer(text)}
    begins |= {match.end() for match in _CLOSES.finditer(text)} if begins else set()
    if not begins:
        raise DePassError(
            f"Spans('turn'): {prompt.name} has no turn marker of a known chat template (ChatML, Llama, "
            "Mistral, Gemma, Phi, harmony, Granite, DeepSeek, Command R, EXAONE, ...); apply the model's "
            "chat template, or give ranges"
        )
    ordered = sorted(begins)
    # White space alone, as after a last [/INST], is no turn.
    ends = [*ordered[1:], len(text)]
    return [start for start, end in zip(ordered, ends, strict=True) if text[start:end].strip()]


def _is_range(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(end, Integral) for end in value)


def _by_ranges(
    prompt: Prompt, ranges: Sequence[tuple[int, int]], unit: Literal["character", "token"]
) -> list[list[int]]:
    if not isinstance(ranges, Sequence) or not all(map(_is_range, ranges)):
        raise DePassError(f"Spans: by is {ranges!r:.80}; give a kind of text, or ranges [(start, end), ...]")
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
