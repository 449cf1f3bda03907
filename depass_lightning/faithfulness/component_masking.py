"""Masking of heads or neurons: accuracy without those that score highest, or lowest.

Source: Hong et al., "DePass" (arXiv 2510.18462), section on attribution to heads and neurons. For a prompt
and its answer:

1. Rank the heads, or the neurons, by score, those of all layers together.
2. *Mask top*: set the first K% to zero, before the output projection and at every position; *mask bottom*:
   the last K%.
3. Let the model generate greedily as many tokens as the answer has, and compare them with it.

The first token that differs ends step 3; until then the model reads the answer's tokens. So one pass over the
prompt and the answer, in which every token of the answer has to be the most likely one, is equivalent to
generation, and gives the answer's probability too.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from torch import Tensor

from depass_lightning.depass import DePass
from depass_lightning.engine.isolation import undisturbed
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness.evaluate import Case, Columns
from depass_lightning.faithfulness.evidence import read_token
from depass_lightning.faithfulness.token_removal import check_percents
from depass_lightning.methods.places import Place, place_of, replaced
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import pad
from depass_lightning.results.attribution import Attribution
from depass_lightning.utils.batching import in_batches
from depass_lightning.utils.tokenization import continuation_ids

MASKED = (0, 1, 2, 5, 10, 20, 50)


@dataclass(frozen=True)
class MaskingCurves:
    """Accuracy and probability of the answer with K% of the heads or neurons masked.

    Attributes:
        masked_percents: the percentages K, from 0 to 100.
        mask_top: 1 where the answer is right with the K% highest scores masked, otherwise 0.
        mask_bottom: the same with the K% lowest scores masked.
        mask_random: the same with a random K% masked, the mean over the random orders; None without any.
        mask_top_probability: the answer's probability with the K% highest scores masked.
        mask_bottom_probability: the answer's probability with the K% lowest scores masked.
        mask_random_probability: the answer's probability with a random K% masked.
    """

    masked_percents: list[float]
    mask_top: list[float]
    mask_bottom: list[float]
    mask_random: list[float] | None
    mask_top_probability: list[float]
    mask_bottom_probability: list[float]
    mask_random_probability: list[float] | None


@dataclass(frozen=True)
class MaskedPrompt:
    """A prompt, the answer after it, and the heads or neurons to mask.

    Args:
        ids: the prompt's tokens.
        answer: the answer's tokens, at least one.
        kept: `[component]`, false where a head or neuron is masked; None masks none.
        position: the token that the answer is read at; None for where the model's head reads a text.
    """

    ids: Sequence[int]
    answer: Sequence[int]
    kept: Tensor | None = None
    position: int | None = None


@dataclass(frozen=True)
class _MaskedLayer:
    """A layer's heads or neurons among the components of `MaskedPrompt.kept`.

    Args:
        place: where they are masked.
        members: `[component]`, true where a component is in this layer.
        numbers: the numbers of these components within the layer.
    """

    place: Place
    members: Tensor
    numbers: Tensor

    def masked(self, prompts: Sequence[MaskedPrompt]) -> Tensor:
        """Return `[batch, 1, head or neuron]`, true where the layer's are masked at every position."""
        masked = torch.zeros(len(prompts), 1, self.place.count, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            if prompt.kept is not None:
                masked[row, 0, self.numbers] = ~prompt.kept[self.members]
        return masked


@dataclass(frozen=True)
class AnswerCheck:
    """Whether the model's greedy continuation is the answer.

    Attributes:
        exact: whether it contains all of the answer's tokens.
        probability: the probability of the whole answer.
    """

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
    """Measure the answer with every attribution's highest and lowest heads or neurons masked.

    Args:
        depass: the model that was attributed, with its tokenizer.
        attributions: scores of heads or of neurons; the rest of the state and biases are ignored.
        answers: the right continuation of each prompt, as text or as token ids.
        percents: the percentages to measure at.
        draws: the number of random orders per prompt; 0 leaves them out.
        seed: seed of the random orders, which depend on it and on the prompt alone.
        batch_size: the number of prompts, each with its mask, in one pass.
        progress: show a progress bar.

    Raises:
        DePassError: percentages are out of range or do not rise, there is not one answer per prompt, an
            answer is empty, components are neither heads nor neurons, or the neurons belong to a mixture of
            experts.
    """
    check_percents(percents)
    if len(answers) != len(attributions):
        raise DePassError(f"{len(attributions)} attributions need as many answers; got {len(answers)}")
    places = _places_of_all(attributions)
    layers = _layers(depass.decoder, places, attributions)
    prompts: list[MaskedPrompt] = []
    plans = []
    for attribution, answer in zip(attributions, answers, strict=True):
        ids = attribution.token_ids[: attribution.last + 1]
        text = attribution.text if len(ids) == len(attribution.token_ids) else None
        answer = answer_ids(depass, text, answer) if isinstance(answer, str) else list(answer)
        masks: dict[bytes, Tensor] = {}
        plan = _plan(attribution, places, percents, draws=draws, seed=seed, masks=masks)
        numbers = {key: len(prompts) + number for number, key in enumerate(masks)}
        plans.append(
            {name: [[numbers[key] for key in keys] for keys in orders] for name, orders in plan.items()}
        )
        prompts += [MaskedPrompt(ids, answer, kept, read_token(attribution)) for kept in masks.values()]
    checks = check_answers(depass.decoder, prompts, layers, batch_size, progress)
    return [_curves(percents, plan, checks) for plan in plans]


@dataclass(frozen=True)
class ComponentMasking:
    """The measure of masked heads or neurons: see `masking_curves`.

    Args:
        percents: the percentages to measure at, ascending from 0 to 100.
        draws: the number of random orders per prompt; 0 leaves them out.
        seed: seed of the random orders.
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
        """Return the curves of every case whose components are heads or neurons."""
        columns: list[Columns] = [{} for _ in cases]
        indices = [i for i, case in enumerate(cases) if case.attribution.source in ("heads", "neurons")]
        attributions = [cases[i].attribution for i in indices]
        answers = [cases[i].answer or cases[i].target_ids[:1] for i in indices]
        curves = masking_curves(depass, attributions, answers, **asdict(self))
        for i, curve in zip(indices, curves, strict=True):
            columns[i] = {name: values for name, values in asdict(curve).items() if values is not None}
        return columns


def answer_ids(depass: DePass, prompt: str | None, answer: str) -> list[int]:
    """Return the tokens of an answer, tokenised as the prompt's continuation.

    Raises:
        DePassError: there is no tokenizer.
    """
    if depass.tokenizer is None:
        raise DePassError(f"the answer {answer!r} is text, but there is no tokenizer; give token ids")
    return continuation_ids(answer, prompt, depass.tokenizer)


@dataclass(frozen=True)
class _Places:
    """The components that are heads or neurons: their indices, layers, and numbers within the layers."""

    indices: Tensor
    layers: Tensor
    numbers: Tensor


def _places_of_all(attributions: Sequence[Attribution]) -> _Places:
    """Return the heads or neurons, which are the same in every attribution.

    Raises:
        DePassError: components are neither, or differ between attributions.
    """
    if not attributions:
        return _Places(*torch.empty(3, 0, dtype=torch.long))
    first = attributions[0]
    if any(other.components != first.components for other in attributions):
        raise DePassError("only attributions over the same heads or neurons can be measured together")
    places = [
        (index, component.layer, component.index)
        for index, component in enumerate(first.components)
        if component.kind in ("head", "neuron")
    ]
    if not places:
        raise DePassError(f"{first.source} are neither heads nor neurons: there is nothing to mask")
    return _Places(*torch.tensor(places).T)


def _layers(decoder: Decoder, places: _Places, attributions: Sequence[Attribution]) -> list[_MaskedLayer]:
    """Return the layers that have any of the heads or neurons."""
    kind = "head" if attributions and attributions[0].source == "heads" else "neuron"
    layers = []
    for layer in places.layers.unique().tolist():
        members = places.layers == layer
        layers.append(_MaskedLayer(place_of(decoder, layer, kind), members, places.numbers[members]))
    return layers


def _plan(
    attribution: Attribution,
    places: _Places,
    percents: Sequence[float],
    *,
    draws: int,
    seed: int,
    masks: dict[bytes, Tensor],
) -> dict[str, list[list[bytes]]]:
    """Return the key of the mask at each point of each curve, and add the masks to `masks`, each once."""
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
        mask = kept.numpy().tobytes()
        masks.setdefault(mask, kept)
        return mask

    return {
        name: [[key(order, percent) for percent in percents] for order in ranked]
        for name, ranked in orders.items()
    }


def _curves(
    percents: Sequence[float], plan: Mapping[str, list[list[int]]], checks: Sequence[AnswerCheck]
) -> MaskingCurves:
    values: dict[str, list[float] | None] = {}
    for name, orders in plan.items():
        points = list(zip(*orders, strict=True))
        exact = [fmean(checks[i].exact for i in point) for point in points]
        probability = [fmean(checks[i].probability for i in point) for point in points]
        values[name], values[f"{name}_probability"] = (exact, probability) if orders else (None, None)
    return MaskingCurves([float(percent) for percent in percents], **values)  # type: ignore[arg-type]


def check_answers(
    decoder: Decoder,
    prompts: Sequence[MaskedPrompt],
    layers: Sequence[_MaskedLayer] = (),
    batch_size: int = 64,
    progress: bool = False,
) -> list[AnswerCheck]:
    """Compare the model's continuation of each prompt with the answer, with heads or neurons masked.

    Args:
        decoder: the model, which is not changed.
        prompts: the prompts, in any order: those of similar length share a pass.
        layers: the layers with masked heads or neurons.
        batch_size: the number of prompts in one pass.
        progress: show a progress bar.

    Raises:
        DePassError: an answer has no tokens, or the batch size is less than one.
    """
    if any(not prompt.answer for prompt in prompts):
        raise DePassError("an answer has no tokens")

    def work(batch: list[int]) -> list[AnswerCheck]:
        return _check_batch(decoder, [prompts[i] for i in batch], layers)

    lengths = [len(prompt.ids) + len(prompt.answer) - 1 for prompt in prompts]
    kinds = [(decoder.regime(length), length) for length in lengths]
    with undisturbed(decoder.model, attention=None):
        return in_batches(kinds, batch_size, work, progress, "asking")


def _check_batch(
    decoder: Decoder, prompts: Sequence[MaskedPrompt], layers: Sequence[_MaskedLayer]
) -> list[AnswerCheck]:
    device = decoder.device
    ids = pad([[*prompt.ids, *prompt.answer[:-1]] for prompt in prompts]).to(device)  # [batch, position]
    # The positions after which the answer's tokens follow, for each prompt.
    end = decoder.head.position_of
    starts = [end(prompt.ids) if prompt.position is None else prompt.position for prompt in prompts]
    places = [
        [start + i for i in range(len(prompt.answer))] for start, prompt in zip(starts, prompts, strict=True)
    ]
    hooked = {number: layer.place for number, layer in enumerate(layers)}
    masks = {number: layer.masked(prompts) for number, layer in enumerate(layers)}
    with replaced(hooked, masks, {}):
        wanted = torch.tensor(sorted({place for row in places for place in row}), device=device)
        logits, _, positions = decoder.logits(ids, wanted)  # [batch, wanted position, vocabulary]
    column = {position: i for i, position in enumerate(positions)}
    checks = []
    for row, (prompt, row_places) in enumerate(zip(prompts, places, strict=True)):
        # [answer token, vocabulary]
        answer_logits = logits[row, [column[place] for place in row_places]].float()
        answer = torch.tensor(list(prompt.answer), device=answer_logits.device)
        hits = answer_logits.argmax(-1) == answer
        log_probabilities = answer_logits.log_softmax(-1).gather(1, answer[:, None])
        checks.append(AnswerCheck(bool(hits.all()), float(log_probabilities.sum().exp())))
    return checks
