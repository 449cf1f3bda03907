"""Record a batch, propagate a source's components to a layer, and name them."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from depass_lightning.attribution.settings import Settings
from depass_lightning.engine.propagate import propagate
from depass_lightning.engine.record import Recording, record, recorded_bytes
from depass_lightning.engine.state import DecomposedState
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt, pad, read_length
from depass_lightning.results.component import Component, constant
from depass_lightning.sources import Source, SplitContext


def record_batch(
    decoder: Decoder, prompts: Sequence[Prompt], positions: Sequence[Sequence[int]], settings: Settings
) -> Recording:
    """Record one batch, each prompt up to the last position that is wanted of it.

    Args:
        decoder: the model.
        prompts: the prompts, padded here.
        positions: `[batch][read]` where each prompt's logits are wanted.
        settings: how the pass is made.

    Raises:
        DePassError: the model's values are not finite.
    """
    lengths = [
        read_length(decoder, prompt, max(wanted)) for prompt, wanted in zip(prompts, positions, strict=True)
    ]
    ids = pad([prompt.ids[:length] for prompt, length in zip(prompts, lengths, strict=True)])
    return record(
        decoder,
        ids.to(decoder.device),
        torch.tensor(lengths, device=decoder.device),
        torch.tensor(sorted(set().union(*positions)), device=decoder.device),
        keep_everything=recorded_bytes(decoder, *ids.shape)
        <= settings.budget.kept(backward=settings.adjoint),
    )


def propagate_to(
    recording: Recording,
    source: Source,
    settings: Settings,
    context: SplitContext,
    layer: int,
    positions: Int[Tensor, "batch target"] | None = None,
) -> DecomposedState:
    """Propagate a source's components to a layer.

    Args:
        recording: the recorded pass.
        source: what the state is split into.
        settings: how the pass is made.
        context: what the source must know of the pass.
        layer: the block whose input is wanted; the number of blocks for the last block's output.
        positions: the only positions needed there, or None for all.

    Raises:
        DePassError: some components begin after that layer.
    """
    state = None
    split = source.split(recording, context)
    steps = propagate(recording, split, settings.effective_rule, stop=layer, positions=positions)
    for _, reached in steps:
        state = reached
    if state is None or state.layout.groups < len(source.layers(recording.layers)):
        raise DePassError(f"some components of {source.kind!r} begin after layer {layer}; take a later layer")
    return state


def describe_components(
    source: Source, prompt: Prompt, decoder: Decoder, settings: Settings
) -> list[Component]:
    """Describe all components of a prompt, each group's bias and rounding last."""
    layers = source.layers(len(decoder.blocks))
    components = []
    for layer, group in zip(layers, source.describe(prompt, decoder), strict=True):
        of_layer = layer if len(layers) > 1 else None
        components += [*group, *(constant(kind, of_layer) for kind in settings.constant_names)]
    return components
