"""Several targets of one prompt from one recorded pass, and under a competing rule from one sweep.

Components are carried to all targets' places at once: what they are there does not depend on what is read.
A linear rule goes back from each target by itself, through the same recording.
"""

from collections.abc import Sequence

import torch

from depass_lightning.engine.propagate import propagate
from depass_lightning.engine.record import Recording, exact
from depass_lightning.prompts import Prompt
from depass_lightning.scores import Reading, Scores, finished, joined, score_batch, uncarried
from depass_lightning.settings import Settings
from depass_lightning.sources import Pass, Source


def score_targets(
    recording: Recording, prompt: Prompt, settings: Settings, readings: list[Reading]
) -> list[Scores]:
    """Score every source's components for each target.

    Args:
        recording: the recorded pass of the prompt alone.
        prompt: the prompt.
        settings: how the pass is made.
        readings: how each target is read, all at the same layer.
    """
    if settings.adjoint:
        each = [score_batch(recording, [prompt], settings, reading) for reading in readings]
        return [_of_targets(own) for own in zip(*each, strict=True)]
    begin = settings.begin([prompt])
    found = []
    for source in settings.sources:
        parts = []
        for own in source.apart(recording.layers):
            apart = [uncarried(recording, own, settings, begin, reading) for reading in readings]
            scores = [each for each in apart if each is not None]
            parts.append(_of_targets(scores or [_carried(recording, own, settings, begin, readings)]))
        found.append(joined(parts))
    return finished(recording, found, settings, readings)


def _of_targets(each: Sequence[Scores]) -> Scores:
    """Several targets' scores of the same components, each of them read by itself."""
    return Scores(torch.cat([own.values for own in each]), [note for own in each for note in own.notes])


def _carried(
    recording: Recording, source: Source, settings: Settings, begin: Pass, readings: list[Reading]
) -> Scores:
    """Scores by carrying components to all targets, which are then read place by place to bound memory."""
    places, of_target = torch.cat([reading.positions for reading in readings]).unique(return_inverse=True)
    decoder = recording.decoder
    # At more places than a head has values, attention costs less done everywhere.
    few = len(places) <= decoder.hidden_size // decoder.heads
    carry = None
    split = source.split(recording, begin)
    for _, reached in propagate(
        recording, split, settings.rule, stop=readings[0].layer, positions=places[None] if few else None
    ):
        carry = reached
    assert carry is not None
    vectors = torch.cat([reading.vectors for reading in readings])
    constants = torch.cat([reading.constants for reading in readings])
    scores = vectors.new_zeros(len(vectors), carry.layout.components)
    with exact(vectors.device):
        for index, place in enumerate(torch.arange(len(places), device=places.device) if few else places):
            here = carry.at(place.view(1, 1))
            states = here.read(recording.final_norm) if readings[0].normed else here.dense()
            own = of_target == index
            scores[own] = vectors[own] @ states[0, :, 0].T
    grouped = scores.unflatten(1, (carry.layout.groups, -1))
    if settings.bias:
        grouped[:, :, 0] += constants[:, None]
    return Scores(grouped, [{} for _ in readings])
