"""Masking heads or neurons: does the model still answer right without those that score high, or low?

Source: Hong et al., "DePass" (arXiv 2510.18462), section on attribution to heads and neurons. For a prompt
and its answer:

1. Rank the heads, or the neurons, by score, those of all layers together.
2. *Mask top*: set the first K% to zero, in front of the map behind them and at every position; *mask bottom*:
   the last K%.
3. Let the model go on greedily for as many tokens as the answer has, and compare them with it.

The first token that differs ends step 3: until then the model reads the answer's own tokens. So one pass over
the prompt and the answer behind it, in which every token of the answer has to be the most likely one, says
what generation would, and gives the answer's probability too.
"""

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from torch import Tensor

from depass_lightning.depass import DePass
from depass_lightning.engine.isolation import undisturbed
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness.evaluate import Case, Columns
from depass_lightning.faithfulness.token_removal import check_percents
from depass_lightning.methods.hook_points import Site, masking, sites_of
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import pad
from depass_lightning.results.attribution import Attribution
from depass_lightning.sources import Heads, Neurons
from depass_lightning.targets import continuation_ids
from depass_lightning.utils.batching import in_batches

MASKED = (0, 1, 2, 5, 10, 20, 50)


@dataclass(frozen=True)
class MaskingCurves:
    """What a model answers with K% of its heads or neurons masked.

    Attributes:
        masked_percents: each K, from 0 to 100.
        mask_top: 1 where the answer is right with the K% highest scores masked, else 0.
        mask_bottom: with the K% lowest.
        mask_random: with a random K%, the mean over the random orders; None where there are none.
        mask_top_probability: the answer's probability, where `mask_top` says whether it is right.
        mask_bottom_probability: of `mask_bottom`.
        mask_random_probability: of `mask_random`.
    """

    masked_percents: list[float]
    mask_top: list[float]
    mask_bottom: list[float]
    mask_random: list[float] | None
    mask_top_probability: list[float]
    mask_bottom_probability: list[float]
    mask_random_probability: list[float] | None


@dataclass(frozen=True)
class Asked:
    """A prompt, and the answer behind it.

    Args:
        ids: the prompt's tokens.
        answer: the answer's tokens, one at least.
        kept: `[component]` false where a head or neuron is masked meanwhile; None masks none.
    """

    ids: Sequence[int]
    answer: Sequence[int]
    kept: Tensor | None = None


@dataclass(frozen=True)
class _Masked:
    """A layer's heads or neurons, and where theirs are among what `Asked.kept` speaks of.

    Args:
        site: the layer's.
        own: `[component]` true where a component is of this layer.
        numbers: these components' numbers in the layer.
    """

    site: Site
    own: Tensor
    numbers: Tensor

    def kept(self, asked: Sequence[Asked]) -> Tensor:
        """Return `[batch, component]` what stays of the layer's."""
        kept = torch.ones(len(asked), self.site.count, dtype=torch.bool)
        for row, each in enumerate(asked):
            if each.kept is not None:
                kept[row, self.numbers] = each.kept[self.own]
        return kept


@dataclass(frozen=True)
class Given:
    """What the model gives where an answer is asked for.

    Attributes:
        first: whether it begins with the answer's first token.
        exact: whether it goes on with all of the answer's tokens.
        probability: of the whole answer.
    """

    first: bool
    exact: bool
    probability: float


def masking_curves(
    depass: DePass,
    attributions: Sequence[Attribution],
    answers: Sequence[str | Sequence[int]],
    *,
    percents: Sequence[float] = MASKED,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> list[MaskingCurves]:
    """Measure what every attribution's highest and lowest heads or neurons are worth to the answer.

    Args:
        depass: the model that was attributed, with its tokenizer.
        attributions: what is judged: scores of heads, or of neurons; of the rest of the state and of biases
            no notice is taken.
        answers: the right continuation of each prompt, as text or as token ids.
        percents: the K to measure at.
        draws: how many random orders a prompt; none leaves them out.
        seed: of the random orders, which depend on it and on the prompt alone.
        batch_size: how many prompts, each with a mask of its own, go through the model together.
        progress: show a progress bar.

    Raises:
        DePassError: the K are not percentages that rise, there is not one answer a prompt, an answer is
            empty, components are neither heads nor neurons, or the neurons are those of a mixture of
            experts.
    """
    check_percents(percents)
    if len(answers) != len(attributions):
        raise DePassError(f"{len(attributions)} attributions need as many answers; got {len(answers)}")
    places = _places_of_all(attributions)
    sites = _sites(depass.decoder, places, attributions)
    asked: list[Asked] = []
    plans = []
    for attribution, answer in zip(attributions, answers, strict=True):
        ids = attribution.token_ids[: attribution.position + 1]
        text = attribution.text if len(ids) == len(attribution.token_ids) else None
        wanted = answer_ids(depass, text, answer) if isinstance(answer, str) else list(answer)
        masks: dict[bytes, Tensor] = {}
        plan = _plan(attribution, places, percents, draws=draws, seed=seed, masks=masks)
        numbers = {key: len(asked) + number for number, key in enumerate(masks)}
        plans.append({name: [[numbers[key] for key in own] for own in keys] for name, keys in plan.items()})
        asked += [Asked(ids, wanted, kept) for kept in masks.values()]
    given = answers_given(depass.decoder, asked, sites, batch_size, progress)
    return [_curves(percents, plan, given) for plan in plans]


@dataclass(frozen=True)
class ComponentMasking:
    """The measure of masked heads or neurons: see `masking_curves`.

    Args:
        percents: the percentages to measure at, ascending from 0 to 100.
        draws: the number of random orders per prompt; 0 leaves them out.
        seed: of the random orders.
        batch_size: the number of prompts, each with its mask, in one pass.
        progress: show a progress bar.

    Raises:
        DePassError: percentages are out of range or do not rise.
    """

    percents: Sequence[float] = MASKED
    draws: int = 1
    seed: int = 0
    batch_size: int = 64
    progress: bool = False

    name = "component masking"
    needs_model = True

    def __post_init__(self) -> None:
        check_percents(self.percents)

    def columns(self, cases: Sequence[Case], depass: DePass) -> list[Columns]:
        """Return the curves of every case whose components are heads or neurons.

        Args:
            cases: what is measured; an answer is right where the model gives all of its tokens.
            depass: the model that was attributed.
        """
        columns: list[Columns] = [{} for _ in cases]
        indices = [i for i, case in enumerate(cases) if case.attribution.source in ("heads", "neurons")]
        attributions = [cases[i].attribution for i in indices]
        answers = [cases[i].answer or cases[i].target_ids[:1] for i in indices]
        curves = masking_curves(depass, attributions, answers, **asdict(self))
        for i, curve in zip(indices, curves, strict=True):
            columns[i] = {name: values for name, values in asdict(curve).items() if values is not None}
        return columns


def answer_ids(depass: DePass, prompt: str | None, answer: str) -> list[int]:
    """Return the tokens of an answer, read as the prompt's continuation.

    Args:
        depass: the model, with its tokenizer.
        prompt: the prompt; None where only its ids are known.
        answer: the text, with its leading space.

    Raises:
        DePassError: there is no tokenizer.
    """
    if depass.tokenizer is None:
        raise DePassError(f"the answer {answer!r} is text, but there is no tokenizer; give token ids")
    return continuation_ids(answer, prompt, depass.tokenizer)


@dataclass(frozen=True)
class _Places:
    """Which components are heads or neurons: their indices, layers, and numbers in these."""

    indices: Tensor
    layers: Tensor
    numbers: Tensor


def _places_of_all(attributions: Sequence[Attribution]) -> _Places:
    """Find the heads or neurons, which are the same ones in every attribution.

    Raises:
        DePassError: components are neither, or differ.
    """
    if not attributions:
        return _Places(*torch.empty(3, 0, dtype=torch.long))
    first = attributions[0]
    if any(other.components != first.components for other in attributions):
        raise DePassError("only attributions over the same heads or neurons can be measured together")
    found = [
        (index, component.layer, component.index)
        for index, component in enumerate(first.components)
        if component.kind in ("head", "neuron")
    ]
    if not found:
        raise DePassError(f"{first.source} are neither heads nor neurons: there is nothing to mask")
    return _Places(*torch.tensor(found).T)


def _sites(decoder: Decoder, places: _Places, attributions: Sequence[Attribution]) -> list[_Masked]:
    """Return where masks are set: only in the layers that have any."""
    source = Heads if attributions and attributions[0].source == "heads" else Neurons
    found = []
    for layer in places.layers.unique().tolist():
        (site,) = sites_of(decoder, source(layer))
        own = places.layers == layer
        found.append(_Masked(site, own, places.numbers[own]))
    return found


def _plan(
    attribution: Attribution,
    places: _Places,
    percents: Sequence[float],
    *,
    draws: int,
    seed: int,
    masks: dict[bytes, Tensor],
) -> dict[str, list[list[bytes]]]:
    """Lay out what each point of each curve masks; each mask is asked for once."""
    scores = attribution.scores[places.indices]
    ranked = scores.sort(descending=True, stable=True).indices
    count = len(ranked)
    generator = random.Random(f"{seed} {attribution.token_ids}")
    orders = {
        "mask_top": [ranked],
        "mask_bottom": [ranked.flip(0)],
        "mask_random": [torch.tensor(generator.sample(range(count), count)) for _ in range(draws)],
    }

    def key(order: Tensor, percent: float) -> bytes:
        kept = torch.ones(count, dtype=torch.bool)
        kept[order[: round(count * percent / 100)]] = False
        found = kept.numpy().tobytes()
        masks.setdefault(found, kept)
        return found

    return {
        name: [[key(order, percent) for percent in percents] for order in own] for name, own in orders.items()
    }


def _curves(
    percents: Sequence[float], plan: Mapping[str, list[list[int]]], given: Sequence[Given]
) -> MaskingCurves:
    values: dict[str, list[float] | None] = {}
    for name, orders in plan.items():
        columns = list(zip(*orders, strict=True))
        exact = [fmean(given[i].exact for i in at) for at in columns]
        probability = [fmean(given[i].probability for i in at) for at in columns]
        values[name], values[f"{name}_probability"] = (exact, probability) if orders else (None, None)
    return MaskingCurves([float(percent) for percent in percents], **values)  # type: ignore[arg-type]


def answers_given(
    decoder: Decoder,
    asked: Sequence[Asked],
    sites: Sequence[_Masked] = (),
    batch_size: int = 64,
    progress: bool = False,
) -> list[Given]:
    """Say how the model goes on behind each prompt, with its heads or neurons masked.

    Args:
        decoder: the model, which is left as it was found.
        asked: what is asked, in any order: prompts of like length go through the model together.
        sites: where the masked heads or neurons are.
        batch_size: how many of them.
        progress: show a progress bar.

    Raises:
        DePassError: an answer has no tokens, or the batch size is less than one.
    """
    if any(not own.answer for own in asked):
        raise DePassError("an answer has no tokens")

    def work(batch: list[int]) -> list[Given]:
        return _batch(decoder, [asked[i] for i in batch], sites)

    lengths = [len(own.ids) + len(own.answer) - 1 for own in asked]
    kinds = [(decoder.regime(length), length) for length in lengths]
    with undisturbed(decoder.model, eager=False):
        return in_batches(kinds, batch_size, work, progress, "asking")


def _batch(decoder: Decoder, asked: Sequence[Asked], sites: Sequence[_Masked]) -> list[Given]:
    device = decoder.device
    ids = pad([[*own.ids, *own.answer[:-1]] for own in asked]).to(device)
    places = [[len(own.ids) - 1 + i for i in range(len(own.answer))] for own in asked]
    with ExitStack() as stack:
        if sites:
            kept = {own.site.layer: own.kept(asked) for own in sites}
            stack.enter_context(masking([own.site for own in sites], kept))
        wanted = torch.tensor(sorted({place for own in places for place in own}), device=device)
        logits, _, positions = decoder.logits(ids, wanted)
    column = {position: i for i, position in enumerate(positions)}
    results = []
    for row, (own, at) in enumerate(zip(asked, places, strict=True)):
        here = logits[row, [column[place] for place in at]].float()
        answer = torch.tensor(list(own.answer), device=here.device)
        right = here.argmax(-1) == answer
        chances = here.log_softmax(-1).gather(1, answer[:, None])
        results.append(Given(bool(right[0]), bool(right.all()), float(chances.sum().exp())))
    return results
