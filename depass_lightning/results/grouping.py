"""Components summed by word, sentence, paragraph, turn or document, and the best citations."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from depass_lightning.errors import DePassError
from depass_lightning.results.component import Component
from depass_lightning.utils.sections import SectionUnit, parts, tokens_of
from depass_lightning.utils.words import word_tokens, word_tokens_by_space

if TYPE_CHECKING:
    from depass_lightning.results.attribution import Attribution


class Citation(NamedTuple):
    """A sentence or paragraph of a document that an answer rests on.

    Attributes:
        document: the document's name.
        text: the sentence.
        score: its contribution to the target's value.
        span: the token range [start, end).
    """

    document: str
    text: str
    score: float
    span: tuple[int, int]


def words_summed(attribution: "Attribution") -> "Attribution":
    """Return an attribution with the pieces of each word summed into one component."""
    if attribution.offsets is not None and attribution.text:
        word_of = word_tokens(attribution.text, attribution.offsets)
    else:
        word_of = word_tokens_by_space(attribution.tokens)
    groups: list[list[int]] = []
    reached = -1  # the last word that the group before reaches
    for i, span in enumerate(attribution.positions):
        joins = span is not None and bool(groups) and word_of[span[0]] <= reached
        if span is not None and span[0] == attribution.answer_start:
            joins = False
        groups[-1].append(i) if joins else groups.append([i])
        reached = -1 if span is None else word_of[span[1] - 1]
    return _summed(attribution, groups, [_merged(attribution, group) for group in groups])


def sections_summed(attribution: "Attribution", by: SectionUnit) -> "Attribution":
    """Return an attribution with the components of each sentence, paragraph, turn or document summed.

    Raises:
        DePassError: the text or the tokens' offsets are not known, or there is no such unit in it.
    """
    if attribution.offsets is None or not attribution.text:
        raise DePassError("the tokens' places in the text are not known; give the prompt as text")
    units = parts(attribution.text, attribution.sections, by)
    if by in ("turn", "document") and not any(part.kind == by for part in units):
        raise DePassError(f"the prompt has no {by}s; pass messages=, or Documents([...], question)")
    unit_of = {
        position: number
        for number, tokens in enumerate(tokens_of(units, attribution.text, attribution.offsets))
        for position in tokens
    }
    members: dict[int, list[int]] = {}
    template, others = [], []
    for i, span in enumerate(attribution.positions):
        numbers = {unit_of[position] for position in range(*span) if position in unit_of} if span else set()
        if len(numbers) > 1:
            raise DePassError(
                f"the component {attribution.components[i].label!r:.40} reaches over several {by}s; choose a "
                "source of smaller components"
            )
        if numbers:
            members.setdefault(numbers.pop(), []).append(i)
        else:
            (template if span or attribution.components[i].kind == "rest" else others).append(i)
    numbers = sorted(members)
    groups = [members[number] for number in numbers]
    components = []
    for number, group in zip(numbers, groups, strict=True):
        merged = _merged(attribution, group)
        label = units[number].name if by in ("turn", "document") else merged.label
        components.append(replace(merged, kind="span", label=label, index=None))
    if template:
        groups.append(template)
        components.append(Component("rest", "template"))
    groups += [[i] for i in others]
    components += [attribution.components[i] for i in others]
    return _summed(attribution, groups, components)


def characters_of(attribution: "Attribution") -> list[tuple[int, int]]:
    """Return each component's character range, without the white space around it."""
    offsets, spans = attribution.offsets or [], []
    for position in attribution.positions:
        covered = [(s, e) for s, e in offsets[slice(*position)] if e > s] if position else []
        low = min((s for s, _ in covered), default=0)
        high = max((e for _, e in covered), default=0)
        piece = attribution.text[low:high]
        low += len(piece) - len(piece.lstrip())
        spans.append((low, max(low, low + len(piece.strip()))))
    return spans


def part_sums(attribution: "Attribution") -> dict[str, float]:
    """Return the sums of the scores of the prompt, of the answer and of everything else."""
    sums: dict[str, float] = {}
    for component, score in zip(attribution.components, attribution.scores.double().tolist(), strict=True):
        part = "other" if component.span is None else "prompt"
        if component.kind in ("chosen", "rejected"):
            part = component.kind
        elif attribution.in_answer(component):
            part = "answer"
        sums[part] = sums.get(part, 0.0) + score
    return sums


def citations(attribution: "Attribution", k: int, by: SectionUnit) -> list[Citation]:
    """Return the parts of the documents with the largest scores, the largest first.

    Raises:
        DePassError: the prompt has no documents, or its components are no positions.
    """
    documents = [part for part in attribution.sections if part.kind == "document"]
    if not documents:
        raise DePassError("the prompt has no documents to cite; pass Documents([...], question)")
    summed = sections_summed(attribution, by)
    owners = tokens_of(documents, attribution.text, attribution.offsets or [])
    names: dict[int, str] = {}
    for part, tokens in zip(documents, owners, strict=True):
        names |= dict.fromkeys(tokens, part.name)
    cited = []
    for i in summed.ranked(len(summed)):
        span, score = summed.positions[i], summed.scores[i].item()
        name = None if span is None else next((names[i] for i in range(*span) if i in names), None)
        if span is not None and name is not None:
            cited.append(Citation(name, summed.text_of(span).strip(), score, span))
    return cited[: max(k, 0)]


def _summed(
    attribution: "Attribution", groups: Sequence[Sequence[int]], components: list[Component]
) -> "Attribution":
    scores = [attribution.scores[list(group)].double().sum().item() for group in groups]
    return replace(attribution, scores=torch.tensor(scores), components=components)


def _merged(attribution: "Attribution", group: Sequence[int]) -> Component:
    """Return neighbouring components as one."""
    first, last = attribution.components[group[0]], attribution.components[group[-1]]
    if len(group) == 1 or first.span is None or last.span is None:
        return first
    span = (first.span[0], last.span[1])
    return Component("span", attribution.text_of(span), span=span)
