"""What the target's value really loses with one component ablated, one after another.

A component's own output is replaced in a plain pass, and everything after it is computed again:

- a head, or a neuron: its part of what the output (down) projection reads;
- what a block's attention or MLP adds to the residual stream, after any norm that follows it;
- a token, or a span: its embeddings.

It is replaced with zero, with its mean over reference prompts and their positions, or with what it is at the
same positions of another prompt (resampling; Zhang & Nanda, "Towards Best Practices of Activation Patching in
Language Models", arXiv 2309.16042).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from depass_lightning.errors import DePassError
from depass_lightning.faithfulness.evidence import text_components
from depass_lightning.methods.model_runs import as_depass_runs
from depass_lightning.methods.places import Place, place_of, reading, replaced
from depass_lightning.models.decoder import Decoder
from depass_lightning.results.attribution import Attribution
from depass_lightning.utils.batching import in_batches

Replacement = Literal["zero", "mean", "resample"]


@dataclass(frozen=True)
class Target:
    """One component that can be ablated.

    Args:
        index: its index among the attribution's scores.
        place: where it is, a key of the places.
        component: its number there.
        positions: the positions where it is replaced, `[start, end)`; None for all from `start` on.
    """

    index: int
    place: str
    component: int
    positions: tuple[int, int] | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What is ablated, whatever else was scored."""
        return self.place, self.component, self.positions


def places_of(decoder: Decoder, attribution: Attribution) -> tuple[dict[str, Place], list[Target]]:
    """Return where an attribution's components are, and which of them can be ablated.

    The rest of the state, biases, special tokens and the last token of a prompt are left out: without its
    last token a prompt has nothing to be read after.

    Args:
        decoder: the model.
        attribution: scores of tokens, spans, heads, neurons, attentions or MLPs.

    Raises:
        DePassError: its components are something else, or the neurons of a mixture of experts.
    """
    if attribution.source in ("tokens", "spans"):
        if attribution.layer != 0:
            raise DePassError(
                f"only tokens of the input can be ablated, not those at layer {attribution.layer}"
            )
        spans = ((i, attribution.positions[i]) for i in text_components(attribution))
        targets = [
            Target(i, "embedding", 0, span) for i, span in spans if span and span[1] <= attribution.last
        ]
        return {"embedding": Place(decoder.token_embedding, 1)}, targets
    places: dict[str, Place] = {}
    targets = []
    for index, component in enumerate(attribution.components):
        kind, layer = component.kind, component.layer
        if layer is None or kind not in ("head", "neuron", "attention", "mixer", "mlp"):
            continue
        key = f"layer {layer} {kind}"
        if key not in places:
            places[key] = place_of(decoder, layer, kind)
        targets.append(Target(index, key, component.index or 0))
    if not targets:
        raise DePassError(f"{attribution.source} cannot be ablated; take tokens, heads, neurons or modules")
    return places, targets


def ablation_effects(
    decoder: Decoder,
    attributions: Sequence[Attribution],
    replacement: Replacement = "zero",
    *,
    references: Sequence[Sequence[int]] = (),
    start: int = 1,
    batch_size: int = 64,
    progress: bool = False,
) -> list[dict[int, float]]:
    """Return what the target's value loses with each component ablated.

    Args:
        decoder: the model that was attributed.
        attributions: whose components are ablated; each brings its prompt and target.
        replacement: what stands in a component's place.
        references: token ids of prompts: for `mean` those that the mean is taken over; for `resample` one for
            each attribution, with as many tokens as its prompt has up to the target.
        start: the first position at which heads, neurons and modules are replaced: the first token, on which
            attention rests by default, has components of a size of their own.
        batch_size: the number of ablated passes that run together.
        progress: show a progress bar.

    Returns:
        For each attribution the loss by the component's index; components that cannot be ablated are left
        out.

    Raises:
        DePassError: the replacement or the components are unknown, references are missing or differ in
            length, or a target is no token.
    """
    substitutes = substitutes_of(decoder, attributions, replacement, references, start)
    lengths = [attribution.last + 1 for attribution in attributions]
    kinds = [(decoder.regime(length), length) for length in lengths]

    def work(indices: list[int]) -> list[dict[int, float]]:
        (index,) = indices
        attribution = attributions[index]
        places, targets = places_of(decoder, attribution)
        with as_depass_runs(decoder):
            values = substitutes(index)
            return [_effects(decoder, attribution, places, targets, values, start, batch_size)]

    return in_batches(kinds, 1, work, progress, "ablating")


def substitutes_of(
    decoder: Decoder,
    attributions: Sequence[Attribution],
    replacement: Replacement,
    references: Sequence[Sequence[int]],
    start: int,
) -> Callable[[int], Mapping[str, Tensor]]:
    """Return what components are replaced with in the prompt of each attribution, as `replaced` takes it.

    Args:
        decoder: the model; it is set up to be run (`as_depass_runs`) where the result is called.
        attributions: whose components are ablated.
        replacement: what stands in a component's place.
        references: as for `ablation_effects`.
        start: the first position that a mean is taken over.

    Raises:
        DePassError: as for `ablation_effects`.
    """
    _check(attributions, replacement, references)
    means: dict[str, Tensor] = {}
    if replacement == "mean" and attributions:
        places, _ = places_of(decoder, attributions[0])
        means = mean_activations(decoder, places, references, 0 if "embedding" in places else start)

    def substitutes(index: int) -> Mapping[str, Tensor]:
        if replacement != "resample":
            return means
        places, _ = places_of(decoder, attributions[index])
        return activations(decoder, places, references[index])

    return substitutes


def _check(
    attributions: Sequence[Attribution], replacement: str, references: Sequence[Sequence[int]]
) -> None:
    if replacement not in get_args(Replacement):
        raise DePassError(f"ablations replace with {', '.join(get_args(Replacement))}; got {replacement!r}")
    if any(not attribution.target_ids for attribution in attributions):
        raise DePassError("ablations are measured on a token's logit or a contrast of two")
    if replacement == "mean" and not references:
        raise DePassError("mean ablation needs reference prompts")
    if replacement == "resample":
        if len(references) != len(attributions):
            raise DePassError(
                f"{len(attributions)} attributions need as many prompts to resample from; "
                f"got {len(references)}"
            )
        for attribution, reference in zip(attributions, references, strict=True):
            if len(reference) != attribution.last + 1:
                raise DePassError(
                    f"a prompt of {attribution.last + 1} tokens cannot be resampled from one of "
                    f"{len(reference)}"
                )


def _effects(
    decoder: Decoder,
    attribution: Attribution,
    places: Mapping[str, Place],
    targets: Sequence[Target],
    values: Mapping[str, Tensor],
    start: int,
    batch_size: int,
) -> dict[int, float]:
    """Return one prompt's effects."""
    ids = torch.tensor([attribution.token_ids[: attribution.last + 1]], device=decoder.device)
    whole = target_values(decoder, attribution, ids)
    effects: dict[int, float] = {}
    for first in range(0, len(targets), batch_size):
        chunk = targets[first : first + batch_size]
        masks = _masks(chunk, places, ids.shape[1], start)
        with replaced({key: places[key] for key in masks}, masks, values):
            losses = whole - target_values(decoder, attribution, ids.expand(len(chunk), -1))
        effects |= dict(zip([target.index for target in chunk], losses.tolist(), strict=True))
    return effects


def _masks(
    targets: Sequence[Target], places: Mapping[str, Place], positions: int, start: int
) -> dict[str, Bool[Tensor, "row position component"]]:
    """Return by place what is replaced in each row, one target a row."""
    masks: dict[str, Tensor] = {}
    for row, target in enumerate(targets):
        shape = len(targets), positions, places[target.place].count
        mask = masks.setdefault(target.place, torch.zeros(shape, dtype=torch.bool))
        mask[row, slice(*(target.positions or (start, positions))), target.component] = True
    return masks


def activations(
    decoder: Decoder, places: Mapping[str, Place], ids: Sequence[int]
) -> dict[str, Float[Tensor, "1 position component size"]]:
    """Return what the components of one prompt are; the model is already set up (`as_depass_runs`)."""
    table = torch.tensor([list(ids)], device=decoder.device)
    with reading(places, 1) as seen:
        decoder.logits(table, torch.tensor([len(ids) - 1], device=decoder.device))
    return seen


def mean_activations(
    decoder: Decoder, places: Mapping[str, Place], references: Sequence[Sequence[int]], start: int
) -> dict[str, Float[Tensor, "component size"]]:
    """Return the components' means over all positions of reference prompts.

    Raises:
        DePassError: no reference reaches the first position that counts.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    with as_depass_runs(decoder):
        for ids in references:
            for key, components in activations(decoder, places, ids).items():
                total = components[0, start:].to(decoder.dtype).sum(0)
                sums[key] = sums[key] + total if key in sums else total
            count += max(len(ids) - start, 0)
    if not count:
        raise DePassError(f"no reference prompt has a token at position {start} or after it")
    return {key: total / count for key, total in sums.items()}


def target_values(decoder: Decoder, attribution: Attribution, ids: Tensor) -> Float[Tensor, "row"]:
    """Return the target's value in each row.

    Args:
        decoder: the model, already set up to be run (`as_depass_runs`).
        attribution: its target's tokens and position.
        ids: `[row, position]` token ids.
    """
    position = torch.tensor([attribution.position], device=ids.device)
    _, uncapped, _ = decoder.logits(ids, position)
    return contrast(uncapped[:, 0, attribution.target_ids].to(decoder.dtype))


def contrast(logits: Float[Tensor, "row token"]) -> Float[Tensor, "row"]:
    """Return a token's logit, a contrast, or the log-odds against several tokens.

    Args:
        logits: those of the target's tokens.
    """
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 0] - logits[:, 1:].logsumexp(1)
