"""Every component's state at a layer: at one layer of a batch, or at every layer of one prompt."""

from collections.abc import Iterator, Sequence

import torch

from depass_lightning.attribution.forward import describe_components, propagate_to, record_batch
from depass_lightning.attribution.settings import Settings
from depass_lightning.engine.isolation import alone
from depass_lightning.engine.propagate import propagate
from depass_lightning.engine.record import Recording
from depass_lightning.engine.state import DecomposedState
from depass_lightning.engine.variants.rounding import rounding_states
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt
from depass_lightning.results.component import Decomposition
from depass_lightning.sources import Tokens, resolve_layer
from depass_lightning.utils.batching import in_batches


def decompose(
    decoder: Decoder, prompts: Sequence[Prompt], settings: Settings, to_layer: int | None, batch_size: int
) -> list[Decomposition]:
    """Decompose prompts at one layer.

    Args:
        decoder: the model.
        prompts: the prompts.
        settings: how the pass is made, with one source.
        to_layer: the block whose input is decomposed; None for the last block's output.
        batch_size: how many prompts go through the model at once.

    Raises:
        DePassError: the layer does not exist or comes before the source's, or the model's values are not
            finite.
    """
    layers = len(decoder.blocks)
    layer = layers
    if to_layer is not None and to_layer != layers:
        layer = resolve_layer(to_layer, layers, "to_layer")
    (source,) = settings.sources
    last = source.layers(layers)[-1]
    if layer < last:
        raise DePassError(f"to_layer={layer} lies before layer {last}, where the state is split")

    def states(batch: list[int]) -> list[Decomposition]:
        return decompose_batch(decoder, [prompts[index] for index in batch], settings, layer)

    kinds = [(decoder.regime(len(prompt.ids)), len(prompt.ids)) for prompt in prompts]
    return in_batches(kinds, batch_size, states, progress=False)


def decompose_batch(
    decoder: Decoder, prompts: Sequence[Prompt], settings: Settings, layer: int
) -> list[Decomposition]:
    """Decompose one batch at one layer.

    Args:
        decoder: the model.
        prompts: the prompts, padded here.
        settings: how the pass is made, with one source.
        layer: the block whose input is decomposed; the number of blocks for the last block's output.

    Raises:
        DePassError: the model's values are not finite.
    """
    with alone(decoder.model):
        recording = _record_whole(decoder, prompts, settings)
        context = settings.split_context(prompts)
        state = propagate_to(recording, settings.sources[0], settings, context, layer)
        return _decompositions(state, recording, prompts, settings, layer)


def decompose_layers(decoder: Decoder, prompt: Prompt, settings: Settings) -> Iterator[Decomposition]:
    """Decompose one prompt at every layer, from the first at which all components exist.

    Yields:
        One layer's decomposition after another; none is kept here.

    Raises:
        DePassError: the model's values are not finite.
    """
    (source,) = settings.sources
    recording = _record_whole(decoder, [prompt], settings)
    split = source.split(recording, settings.split_context([prompt]))
    steps = propagate(recording, split, settings.rule, stop=recording.layers)
    while True:
        with alone(decoder.model):  # not while the caller works with a layer
            layer, state = next(steps, (None, None))
            if layer is None or state is None:
                return
            complete = state.layout.groups == len(source.layers(recording.layers))
            results = _decompositions(state, recording, [prompt], settings, layer) if complete else []
        yield from results


def _record_whole(decoder: Decoder, prompts: Sequence[Prompt], settings: Settings) -> Recording:
    (source,) = settings.sources
    if source.top is not None:
        raise DePassError("Neurons(top=) gives scores, not states; leave top out to decompose")
    if isinstance(source, Tokens) and source.refine is not None:
        raise DePassError("Tokens(refine=) is refined by a target's scores; leave refine out to decompose")
    return record_batch(decoder, prompts, [[len(prompt.ids) - 1] for prompt in prompts], settings)


def _decompositions(
    state: DecomposedState,
    recording: Recording,
    prompts: Sequence[Prompt],
    settings: Settings,
    layer: int,
) -> list[Decomposition]:
    """Take each prompt's components out of a batch's state, without padding."""
    (source,) = settings.sources
    # [batch, group, component, position, hidden]
    states = state.dense().unflatten(1, (state.layout.groups, -1))
    rounded = torch.empty(0)
    if settings.rounding:
        starts, after_mlp = source.layers(recording.layers), source.after_mlp
        # [batch, group, position, hidden]
        rounded = rounding_states(recording, settings.rule, starts, after_mlp=after_mlp, stop=layer)
    results = []
    for row, (prompt, groups) in enumerate(zip(prompts, states, strict=True)):
        components = describe_components(source, prompt, recording.decoder, settings)
        count = len(components) // len(groups) - int(settings.rounding)
        # The bias component is propagated first and named last; further components belong to longer prompts.
        kept = torch.cat([groups[:, 1:count], groups[:, :1]], 1) if settings.bias else groups[:, :count]
        if settings.rounding:
            kept = torch.cat([kept, rounded[row][:, None]], 1)
        results.append(Decomposition(kept.flatten(0, 1)[:, : len(prompt.ids)], components, layer))
    return results
