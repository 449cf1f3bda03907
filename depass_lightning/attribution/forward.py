"""One batch's way through a decomposed pass: record, split, carry; and the states that come of it.

The functions take what `depass.py` has checked; they know neither the order of a call's prompts nor its
defaults.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from depass_lightning.attribution.settings import Settings
from depass_lightning.engine.isolation import alone
from depass_lightning.engine.propagate import propagate
from depass_lightning.engine.record import Recording, record, recorded_bytes
from depass_lightning.engine.state import DecomposedState
from depass_lightning.engine.variants.rounding import rounding_states
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt, pad
from depass_lightning.results.decomposition import Decomposition
from depass_lightning.sources import Neurons, Source, SplitContext


def decompose_batch(
    decoder: Decoder, prompts: list[Prompt], settings: Settings, stop: int
) -> list[Decomposition]:
    """Decompose one batch.

    Args:
        decoder: the model.
        prompts: the prompts, padded here.
        settings: how the pass is made.
        stop: the layer whose components are wanted.

    Raises:
        DePassError: the model's values are not finite.
    """
    with alone(decoder.model):
        recording = _record_whole(decoder, prompts, settings)
        carry = carry_to(recording, settings.sources[0], settings, settings.begin(prompts), stop)
        return _decompositions(carry, recording, prompts, settings, stop)


def decompose_layers(decoder: Decoder, prompt: Prompt, settings: Settings) -> Iterator[Decomposition]:
    """Decompose one prompt at every layer, one after another, from the first where all components are there.

    Args:
        decoder: the model.
        prompt: the prompt.
        settings: how the pass is made.

    Yields:
        The decompositions, of which none is kept here.

    Raises:
        DePassError: the model's values are not finite.
    """
    source = settings.sources[0]
    recording = _record_whole(decoder, [prompt], settings)
    split = source.split(recording, settings.begin([prompt]))
    steps = propagate(recording, split, settings.rule, stop=recording.layers)
    while True:
        with alone(decoder.model):  # not while the caller has the turn
            layer, carry = next(steps, (None, None))
            if layer is None or carry is None:
                return
            complete = carry.layout.groups == len(source.layers(recording.layers))
            found = _decompositions(carry, recording, [prompt], settings, layer) if complete else []
        yield from found


def _record_whole(decoder: Decoder, prompts: list[Prompt], settings: Settings) -> Recording:
    source = settings.sources[0]
    if isinstance(source, Neurons) and source.top is not None:
        raise DePassError("Neurons(top=) gives scores, not states; leave top out to decompose")
    lengths = [len(prompt.ids) for prompt in prompts]
    return record_batch(decoder, prompts, [[length - 1] for length in lengths], lengths, settings)


def _decompositions(
    carry: DecomposedState, recording: Recording, prompts: list[Prompt], settings: Settings, layer: int
) -> list[Decomposition]:
    states = carry.dense().unflatten(1, (carry.layout.groups, -1))
    decoder, results = recording.decoder, []
    rounded = torch.empty(0)
    if settings.rounding:
        (source,) = settings.sources
        starts, behind = source.layers(recording.layers), source.behind_mlp
        rounded = rounding_states(recording, settings.rule, starts, behind_mlp=behind, stop=layer)
    for row, (prompt, own) in enumerate(zip(prompts, states, strict=True)):
        names, _ = described(settings.sources[0], prompt, decoder, settings)
        members = len(names) // len(own) - int(settings.rounding)
        # The bias component is carried first and named last; what longer prompts have more is padding.
        kept = torch.cat([own[:, 1:members], own[:, :1]], 1) if settings.bias else own[:, :members]
        if settings.rounding:
            kept = torch.cat([kept, rounded[row][:, None]], 1)
        results.append(Decomposition(kept.flatten(0, 1)[:, : len(prompt.ids)], names, layer))
    return results


def record_batch(
    decoder: Decoder,
    prompts: list[Prompt],
    positions: list[list[int]],
    lengths: list[int],
    settings: Settings,
) -> Recording:
    """Record one batch.

    Args:
        decoder: the model.
        prompts: the prompts, padded here.
        positions: where each prompt's logits are wanted, as many places a prompt.
        lengths: how many of each prompt's tokens take part.
        settings: how the pass is made.

    Raises:
        DePassError: the model's values are not finite.
    """
    ids = pad([prompt.ids[:length] for prompt, length in zip(prompts, lengths, strict=True)])
    return record(
        decoder,
        ids.to(decoder.device),
        torch.tensor(lengths, device=decoder.device),
        torch.tensor(positions, device=decoder.device),
        keep_everything=recorded_bytes(decoder, *ids.shape) <= settings.budget.recording,
    )


def carry_to(
    recording: Recording,
    source: Source,
    settings: Settings,
    begin: SplitContext,
    stop: int,
    positions: Tensor | None = None,
) -> DecomposedState:
    """Carry a source's components to a layer.

    Args:
        recording: the recorded pass.
        source: what the state is split into.
        settings: how the pass is made.
        begin: what the source must know of it.
        stop: the layer.
        positions: `[batch, target]` the only positions needed there, or None for all.

    Raises:
        DePassError: some components begin behind that layer.
    """
    carry = None
    split = source.split(recording, begin)
    for _, reached in propagate(recording, split, settings.effective_rule, stop=stop, positions=positions):
        carry = reached
    if carry is None or carry.layout.groups < len(source.layers(recording.layers)):
        raise DePassError(f"some components of {source.kind!r} begin behind layer {stop}; take a later layer")
    return carry


def described(
    source: Source, prompt: Prompt, decoder: Decoder, settings: Settings
) -> tuple[list[str], list[tuple[int, int] | None]]:
    """The names and token ranges of all components of a prompt, each group's bias and rounding last.

    Args:
        source: what its state is split into.
        prompt: the prompt.
        decoder: the model.
        settings: how the pass is made.
    """
    description = source.describe(prompt, decoder)
    layers = source.layers(len(decoder.blocks))
    names, positions = [], []
    for layer, group in zip(layers, description.names, strict=True):
        last = [f"layer {layer} {name}" if len(layers) > 1 else name for name in settings.constant_names]
        names += [*group, *last]
        positions += [*description.positions, *([None] * len(last))]
    return names, positions
