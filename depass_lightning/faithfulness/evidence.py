"""Whether the known evidence has the highest scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchmetrics.functional.classification import binary_auroc

from depass_lightning.faithfulness.ablated_prompts import AblatedPrompt
from depass_lightning.results.attribution import Attribution
from depass_lightning.utils.sections import ablatable


@dataclass(frozen=True)
class Evidence:
    """How an attribution ranks the evidence of its prompt.

    Attributes:
        first: evidence ranked first: whether the component with the highest score is evidence.
        chance: how often a random order ranks evidence first: the fraction of components that are evidence.
        auroc: how often a component that is evidence scores higher than one that is not, 0.5 by chance; None
            where all components are evidence.
    """

    first: bool
    chance: float
    auroc: float | None = None


def prompt_end(attribution: Attribution) -> int:
    """Return the last position of the prompt: where the target is read, or before a whole answer."""
    start = attribution.answer_start if attribution.whole_answer else None
    return attribution.last if start is None else start - 1


def read_token(attribution: Attribution) -> int | None:
    """Return the token that an encoder's target is read at, which is never removed; None for other targets.

    It is a mask token, or a token that a classifier labels.
    """
    inside = attribution.metadata.get("encoder") in ("masked", "token")
    return attribution.position if inside else None


def ablated_prompt(attribution: Attribution, kept: Sequence[int], answer: Sequence[int]) -> AblatedPrompt:
    """Return an attribution's prompt with only some of its tokens.

    Args:
        attribution: the scores, with their prompt's token ids.
        kept: the positions of these tokens, ascending; `read_token` is one of them, where there is one.
        answer: the ids of the answer's tokens.
    """
    read = read_token(attribution)
    ids = [attribution.token_ids[place] for place in kept]
    return AblatedPrompt(ids, [True] * len(ids), answer, None if read is None else kept.index(read))


def answer_tokens(attribution: Attribution) -> list[int]:
    """Return the ids of the explained answer: a token, or a whole answer; none for a direction."""
    if attribution.target_ids:
        return attribution.target_ids[:1]
    start = attribution.answer_start
    return [] if start is None else attribution.token_ids[start : attribution.position + 2]


def text_components(attribution: Attribution) -> list[int]:
    """Return the indices of the components that represent text up to the target's position.

    A bias is not among them, and neither are special tokens, which the tokenizer adds and which have no
    characters of the text, the tokens of a template, and the token of `read_token`. Of a prompt with
    documents only these count. Without offsets, every component that represents tokens counts.
    """
    offsets, count, last = attribution.offsets, len(attribution.tokens), prompt_end(attribution)
    text = set(ablatable(attribution.text, attribution.sections, offsets, count))
    read = read_token(attribution)
    return [
        i
        for i, span in enumerate(attribution.positions)
        if span is not None
        and span[1] <= last + 1
        and read not in range(*span)
        and not text.isdisjoint(range(*span))
    ]


def without_last(attribution: Attribution, components: Sequence[int]) -> list[int]:
    """Return those of the components that do not hold the last token, after which the target is read."""
    ends = [span[1] if span else 0 for span in attribution.positions]
    return [i for i in components if ends[i] <= prompt_end(attribution)]


def evidence_found(
    attribution: Attribution, ranges: Sequence[tuple[int, int]], *, keep_last: bool = False
) -> Evidence | None:
    """Compare scores with known evidence, among the components that represent text.

    Args:
        attribution: the scores; a bias and special tokens are not candidates.
        ranges: the character ranges `[start, end)` of the evidence in the text.
        keep_last: the component that holds the last token is no candidate either.

    Returns:
        None if there is nothing to compare: there is no range, the tokens' offsets are not known, or no
        candidate overlaps the ranges.
    """
    if attribution.offsets is None:
        return None
    candidates = text_components(attribution)
    if keep_last:
        candidates = without_last(attribution, candidates)
    evidence = set(attribution.overlapping(ranges)) & set(candidates)
    if not evidence:
        return None
    first = max(candidates, key=lambda i: attribution.scores[i].item())
    return Evidence(
        first=first in evidence,
        chance=len(evidence) / len(candidates),
        auroc=_auroc(attribution, candidates, evidence),
    )


def _auroc(attribution: Attribution, candidates: list[int], evidence: set[int]) -> float | None:
    if len(evidence) == len(candidates):
        return None
    # Ranks between 0 and 1: torchmetrics applies a sigmoid to anything else, where large scores become equal.
    _, ranks = torch.unique(attribution.scores[candidates], sorted=True, return_inverse=True)
    labels = torch.tensor([int(i in evidence) for i in candidates])
    return float(binary_auroc(ranks / max(int(ranks.max()), 1), labels))
