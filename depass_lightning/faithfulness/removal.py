"""Patch top and recover top: does the answer leave with the tokens that score high, and come back with
them?

Source: Hong et al., "DePass" (arXiv 2510.18462), section on token-level attribution. For a prompt and its
    answer:

1. Rank the components that stand for text by score, the highest first. Special tokens (a leading "<s>") are
   no
   candidates: they stay.
2. *Patch top*: remove the first K% of them; *recover top*: keep only the first K%.
3. Encode what is left again, as a prompt of its own, and read the answer's probability after its last
   token.

Both are also done in random orders, which every method has to beat: patch top by falling sooner, recover
top by rising sooner.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from depass_lightning.attribution import Attribution
from depass_lightning.errors import DePassError

PERCENTS = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)


@dataclass(frozen=True)
class RemovalCurves:
    """The answer's probability with K% of a prompt's tokens removed, or only K% kept.

    Attributes:
        percents: each K, from 0 to 100.
        patch_top: with the K% highest scores removed.
        recover_top: with only the K% highest scores kept.
        patch_random: with a random K% removed, the mean over the random orders.
        recover_random: with only a random K% kept, the mean over the same orders.
    """

    percents: list[float]
    patch_top: list[float]
    recover_top: list[float]
    patch_random: list[float]
    recover_random: list[float]


def area(percents: Sequence[float], curve: Sequence[float]) -> float:
    """Return the area under a curve over K from 0 to 1 (trapezoids), as a mean height: between 0 and 1."""
    if len(percents) < 2 or len(percents) != len(curve):
        raise DePassError(
            f"an area needs two points or more, a value each; got {len(percents)} and {len(curve)}"
        )
    steps = zip(percents[:-1], percents[1:], curve[:-1], curve[1:], strict=True)
    return sum((right - left) * (a + b) / 2 for left, right, a, b in steps) / (percents[-1] - percents[0])


def check_percents(percents: Sequence[float]) -> None:
    """Refuse anything but percentages in rising order.

    Raises:
        DePassError: there are none, one is out of range, or they do not rise.
    """
    rising = all(low < high for low, high in itertools.pairwise(percents))
    if not (percents and rising and percents[0] >= 0 and percents[-1] <= 100):
        raise DePassError(f"percents must rise from 0 at least to 100 at most; got {list(percents)}")


def text_components(attribution: Attribution) -> list[int]:
    """Return the indices of the components that stand for text up to the target's position.

    Not among them: a bias, and special tokens, which the tokenizer adds and which have no characters of the
    text. Where the tokenizer gave no offsets, every component that stands for tokens counts.
    """
    offsets = attribution.offsets
    found = []
    for i, span in enumerate(attribution.positions):
        if span is None or span[1] > attribution.position + 1:
            continue
        if offsets is None or any(end > start for start, end in offsets[slice(*span)]):
            found.append(i)
    return found


def removal_curves(
    model: nn.Module,
    attributions: Sequence[Attribution],
    answers: Sequence[int],
    *,
    percents: Sequence[float] = PERCENTS,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
) -> list[RemovalCurves]:
    """Measure patch top and recover top, and the same in random order, for every attribution.

    Args:
        model: the causal LM that was attributed.
        attributions: what is judged; each brings its prompt's token ids.
        answers: the token id whose probability is followed, one a prompt.
        percents: the K to measure at.
        draws: how many random orders a prompt.
        seed: of the random orders, which depend on it and on the prompt alone: not on its place, batch or
            process.
        batch_size: how many shortened prompts go through the model together.

    Raises:
        DePassError: the K are not percentages that rise, or there is not one answer a prompt.
    """
    check_percents(percents)
    if len(answers) != len(attributions):
        raise DePassError(f"{len(attributions)} attributions need as many answers; got {len(answers)}")
    plans = [_plan(attribution, percents, draws, seed) for attribution in attributions]
    prompts, wanted = [], []
    for attribution, answer, plan in zip(attributions, answers, plans, strict=True):
        prompts += [[attribution.token_ids[i] for i in kept] for kept in plan.sequences]
        wanted += [answer] * len(plan.sequences)
    probabilities = _answer_probabilities(model, prompts, wanted, batch_size)
    curves, start = [], 0
    for plan in plans:
        curves.append(plan.read(probabilities[start : start + len(plan.sequences)]))
        start += len(plan.sequences)
    return curves


@dataclass
class _Plan:
    """The shortened prompts of one prompt, each once, and where each curve's points are among them."""

    percents: list[float]
    sequences: list[tuple[int, ...]]
    curves: dict[str, list[list[int]]]  # name -> order -> the sequence at each K

    def read(self, probabilities: list[float]) -> RemovalCurves:
        means = {
            name: [sum(probabilities[i] for i in at) / len(at) for at in zip(*orders, strict=True)]
            for name, orders in self.curves.items()
        }
        return RemovalCurves(percents=self.percents, **means)


def _plan(attribution: Attribution, percents: Sequence[float], draws: int, seed: int) -> _Plan:
    """Lay out which tokens each point of each curve keeps."""
    candidates = text_components(attribution)
    ranked = sorted(candidates, key=lambda i: -attribution.scores[i].item())
    generator = random.Random(f"{seed} {attribution.token_ids}")
    shuffled = [generator.sample(candidates, len(candidates)) for _ in range(max(draws, 1))]
    numbers: dict[tuple[int, ...], int] = {}

    def number(order: list[int], percent: float, keep: bool) -> int:
        count = round(len(order) * percent / 100)
        left = order[:count] if keep else order[count:]
        return numbers.setdefault(_kept(attribution, candidates, left), len(numbers))

    def points(orders: list[list[int]], keep: bool) -> list[list[int]]:
        return [[number(order, percent, keep) for percent in percents] for order in orders]

    curves = {
        "patch_top": points([ranked], keep=False),
        "recover_top": points([ranked], keep=True),
        "patch_random": points(shuffled, keep=False),
        # What a random order keeps last is as random: the same shortened prompts serve both curves.
        "recover_random": points([order[::-1] for order in shuffled], keep=True),
    }
    return _Plan([float(percent) for percent in percents], list(numbers), curves)


def _kept(attribution: Attribution, candidates: list[int], left: list[int]) -> tuple[int, ...]:
    """Return the positions that stay: all but those of the candidates that are not left.

    A model needs one token to read: where nothing would stay, the last token does, whatever the order.
    """
    gone: set[int] = set()
    for i in set(candidates) - set(left):
        gone.update(range(*(attribution.positions[i] or (0, 0))))
    kept = tuple(i for i in range(attribution.position + 1) if i not in gone)
    return kept or (attribution.position,)


@torch.no_grad()
def _answer_probabilities(
    model: nn.Module, prompts: Sequence[list[int]], answers: Sequence[int], batch_size: int
) -> list[float]:
    """Return the probability of each prompt's answer, running prompts of like length together."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [0.0] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(by_length), batch_size):
            numbers = by_length[start : start + batch_size]
            next_token = _next_token(model, [prompts[i] for i in numbers])
            wanted = torch.tensor([answers[i] for i in numbers], device=next_token.device)
            probabilities = next_token.gather(1, wanted[:, None])[:, 0].tolist()
            for i, probability in zip(numbers, probabilities, strict=True):
                found[i] = probability
    finally:
        model.train(was_training)
    return found


def _next_token(model: nn.Module, prompts: Sequence[list[int]]) -> Float[Tensor, "batch vocabulary"]:
    """Return the probabilities of the token after each prompt.

    Padded on the left, so that only the last position's logits are ever computed; causality and the mask
    keep the padding from mattering.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * p + prompt for p, prompt in zip(padding, prompts, strict=True)], device=device)
    mask = torch.tensor([[0] * p + [1] * (longest - p) for p in padding], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
    ).logits
    return logits[:, -1].float().softmax(-1)
