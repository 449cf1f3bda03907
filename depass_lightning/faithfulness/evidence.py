"""Whether scores point at the tokens that are known to be right."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchmetrics.functional.classification import binary_auroc

from depass_lightning.results.attribution import Attribution


@dataclass(frozen=True)
class Evidence:
    """How an attribution stands to the evidence of its prompt.

    Attributes:
        first: whether the component with the highest score is evidence.
        chance: how often a random order puts evidence first: the share of the components that are evidence.
        auroc: how often a component that is evidence scores higher than one that is not, 0.5 by chance; None
            where all components are evidence.
    """

    first: bool
    chance: float
    auroc: float | None = None


def text_components(attribution: Attribution) -> list[int]:
    """Return the indices of the components that stand for text up to the target's position.

    Not among them: a bias, and special tokens, which the tokenizer adds and which have no characters of the
    text. Where the tokenizer gave no offsets, every component that stands for tokens counts.
    """
    offsets = attribution.offsets
    indices = []
    for i, span in enumerate(attribution.positions):
        if span is None or span[1] > attribution.position + 1:
            continue
        if offsets is None or any(end > start for start, end in offsets[slice(*span)]):
            indices.append(i)
    return indices


def evidence_found(attribution: Attribution, ranges: Sequence[tuple[int, int]]) -> Evidence | None:
    """Compare scores with known evidence, among the components that stand for text.

    Args:
        attribution: the scores; a bias and special tokens are no candidates.
        ranges: the character ranges of the text that are the evidence.

    Returns:
        None where there is nothing to compare: no range is given, the tokens' places in the text are not
        known, or no candidate overlaps the ranges.
    """
    if attribution.offsets is None:
        return None
    candidates = text_components(attribution)
    right = set(attribution.overlapping(ranges)) & set(candidates)
    if not right:
        return None
    first = max(candidates, key=lambda i: attribution.scores[i].item())
    return Evidence(
        first=first in right,
        chance=len(right) / len(candidates),
        auroc=_auroc(attribution, candidates, right),
    )


def _auroc(attribution: Attribution, candidates: list[int], right: set[int]) -> float | None:
    if len(right) == len(candidates):
        return None
    # Ranks between 0 and 1: torchmetrics puts anything else through a sigmoid, where large scores meet.
    _, ranks = torch.unique(attribution.scores[candidates], sorted=True, return_inverse=True)
    labels = torch.tensor([int(i in right) for i in candidates])
    return float(binary_auroc(ranks / max(int(ranks.max()), 1), labels))
