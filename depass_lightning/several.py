"""Several targets of one prompt from one recorded pass, and under a competing rule from one sweep.

Components are carried to all targets' places at once: what they are there does not depend on what is read.
A linear rule goes back from each target by itself, through the same recording.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.engine.propagate import propagate
from depass_lightning.engine.record import Recording, exact
from depass_lightning.passes import Reading, Settings, score_batch
from depass_lightning.prompts import Prompt
from depass_lightning.sources import Source


def score_targets(
    recording: Recording, prompt: Prompt, settings: Settings, readings: list[Reading]
) -> list[Float[Tensor, "target group component"]]:
    """Score every source's components for each target, the bias component last in each group.

    Args:
        recording: the recorded pass of the prompt alone.
        prompt: the prompt.
        settings: how the pass is made.
        readings: how each target is read, all at the same layer.
    """
    if settings.adjoint:
        each = [score_batch(recording, [prompt], settings, reading) for reading in readings]
        return [torch.cat(own) for own in zip(*each, strict=True)]
    return [_carried(recording, prompt, source, settings, readings) for source in settings.sources]


def _carried(
    recording: Recording, prompt: Prompt, source: Source, settings: Settings, readings: list[Reading]
) -> Tensor:
    """Scores by carrying components to all targets, which are then read place by place to bound memory."""
    places, of_target = torch.cat([reading.positions for reading in readings]).unique(return_inverse=True)
    decoder = recording.decoder
    # At more places than a head has values, attention costs less done everywhere.
    few = len(places) <= decoder.hidden_size // decoder.heads
    carry = None
    split = source.split(recording, settings.begin([prompt]))
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
    if not settings.bias:
        return grouped
    return torch.cat([grouped[:, :, 1:], grouped[:, :, :1] + constants[:, None, None]], 2)
