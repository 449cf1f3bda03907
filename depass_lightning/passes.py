"""One batch's way through a decomposed pass: record, split, carry, read (or read, and carry back).

The functions take what `depass.py` has checked; they know neither the order of a call's prompts nor its
defaults.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.engine.adjoint import at_readout, pull_back
from depass_lightning.engine.carry import Carry
from depass_lightning.engine.memory import Budget
from depass_lightning.engine.propagate import propagate
from depass_lightning.engine.record import Recording, exact, record, recorded_bytes
from depass_lightning.engine.rules import LinearPaths, Rule
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt, pad
from depass_lightning.sources import Pass, Source


@dataclass(frozen=True)
class Decomposition:
    """Every component's state at one layer.

    Attributes:
        states: `[component, position, hidden]`; they sum to the model's residual stream there.
        names: the components' names.
        layer: the block that this state enters; the number of blocks means behind the last one.
    """

    states: Float[Tensor, "component position hidden"]
    names: list[str]
    layer: int


@dataclass(frozen=True)
class Settings:
    """How a pass is made: the same for every prompt of a call.

    Args:
        sources: what the state is split into, each by itself.
        rule: how neurons are shared.
        rule_name: what the rule is called.
        bias: whether constants have a component of their own.
        bias_mode: what becomes of constants: component, drop, or none where the model has none.
        compat: `release` for the published code's behaviour, else None.
        adjoint: take scores back from the target instead of carrying components to it.
        path: content, or control for what comes on top where attention's probabilities are not held fixed.
        budget: the engine's memory.
    """

    sources: tuple[Source, ...]
    rule: Rule
    rule_name: str
    bias: bool
    bias_mode: str
    compat: str | None
    adjoint: bool
    path: str
    budget: Budget

    def begin(self, prompts: list[Prompt]) -> Pass:
        """What sources must know of a batch's pass."""
        return Pass(
            prompts,
            bias=self.bias,
            competing=not isinstance(self.rule, LinearPaths),
            release=self.compat == "release",
            budget=self.budget,
        )


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
    with exact(decoder.device):
        recording = _record_whole(decoder, prompts, settings)
        carry = _carry(recording, settings.sources[0], settings, settings.begin(prompts), stop)
        return _decompositions(carry, decoder, prompts, settings, stop)


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
    for layer, carry in propagate(recording, split, settings.rule, stop=recording.layers):
        if carry.layout.groups == len(source.layers(recording.layers)):
            yield _decompositions(carry, decoder, [prompt], settings, layer)[0]


def _record_whole(decoder: Decoder, prompts: list[Prompt], settings: Settings) -> Recording:
    lengths = [len(prompt.ids) for prompt in prompts]
    return record_batch(decoder, prompts, [[length - 1] for length in lengths], lengths, settings)


def _decompositions(
    carry: Carry, decoder: Decoder, prompts: list[Prompt], settings: Settings, layer: int
) -> list[Decomposition]:
    states = carry.dense().unflatten(1, (carry.layout.groups, -1))
    results = []
    for prompt, own in zip(prompts, states, strict=True):
        names, _ = described(settings.sources[0], prompt, decoder, bias=settings.bias)
        members = len(names) // len(own)
        # The bias component is carried first and named last; what longer prompts have more is padding.
        kept = torch.cat([own[:, 1:members], own[:, :1]], 1) if settings.bias else own[:, :members]
        results.append(Decomposition(kept.flatten(0, 1)[:, : len(prompt.ids)], names, layer))
    return results


@dataclass(frozen=True)
class Reading:
    """How the targets of a batch are read from the states where they stand.

    Args:
        layer: where they stand; the number of blocks is behind the last one.
        positions: `[batch]` each prompt's position.
        vectors: `[batch, hidden]` what the state is multiplied with.
        constants: `[batch]` what is added.
        normed: the state is read behind the final norm.
    """

    layer: int
    positions: Tensor
    vectors: Float[Tensor, "batch hidden"]
    constants: Float[Tensor, "batch"]
    normed: bool


def score_batch(
    recording: Recording, prompts: list[Prompt], settings: Settings, reading: Reading
) -> list[Float[Tensor, "batch group component"]]:
    """Score every source's components for a batch's targets, the bias component last in each group.

    Args:
        recording: the recorded pass.
        prompts: the prompts, in the recording's order.
        settings: how the pass is made.
        reading: how the targets are read.
    """
    begin = settings.begin(prompts)
    if settings.adjoint:
        assert isinstance(settings.rule, LinearPaths)
        groups = _pulled_back(recording, settings, settings.rule, begin, reading)
        if settings.path == "control":
            free = _pulled_back(recording, settings, replace(settings.rule, control=1.0), begin, reading)
            groups = [both - content for both, content in zip(free, groups, strict=True)]
    else:
        groups = [_carried(recording, source, settings, begin, reading) for source in settings.sources]
    return [torch.cat([own[:, :, 1:], own[:, :, :1]], 2) if settings.bias else own for own in groups]


def _carried(
    recording: Recording, source: Source, settings: Settings, begin: Pass, reading: Reading
) -> Tensor:
    """Scores by carrying components to the target."""
    carry = _carry(recording, source, settings, begin, reading.layer, reading.positions[:, None])
    states = carry.read(recording.final_norm) if reading.normed else carry.dense()
    scores = (states[:, :, 0] @ reading.vectors[:, :, None])[:, :, 0].unflatten(1, (carry.layout.groups, -1))
    if settings.bias:
        scores[:, :, 0] += reading.constants[:, None]
    return scores


def _pulled_back(
    recording: Recording, settings: Settings, rule: LinearPaths, begin: Pass, reading: Reading
) -> list[Tensor]:
    """Scores of all sources from one backward pass."""
    derivative = at_readout(
        recording, reading.positions, reading.vectors, reading.constants, normed=reading.normed
    )
    wanted = [source.layers(recording.layers) for source in settings.sources]
    scores: list[dict[int, Tensor]] = [{} for _ in settings.sources]
    first = min(layers[0] for layers in wanted)
    for at in pull_back(recording, rule, derivative, layer=reading.layer, first=first):
        for source, layers, own in zip(settings.sources, wanted, scores, strict=True):
            if at.block.index in layers:
                found = source.inside_scores(at, begin)
                if found is None:
                    found = source.entry_scores(recording, begin, at.block.index, at.entry)
                assert found is not None
                own[at.block.index] = found
    return [torch.stack([own[layer] for layer in sorted(own)], 1) for own in scores]


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


def _carry(
    recording: Recording,
    source: Source,
    settings: Settings,
    begin: Pass,
    stop: int,
    positions: Tensor | None = None,
) -> Carry:
    carry = None
    split = source.split(recording, begin)
    for _, reached in propagate(recording, split, settings.rule, stop=stop, positions=positions):
        carry = reached
    if carry is None or carry.layout.groups < len(source.layers(recording.layers)):
        raise DePassError(f"some components of {source.kind!r} begin behind layer {stop}; take a later layer")
    return carry


def described(
    source: Source, prompt: Prompt, decoder: Decoder, *, bias: bool
) -> tuple[list[str], list[tuple[int, int] | None]]:
    """The names and token ranges of all components of a prompt, each group's bias component last.

    Args:
        source: what its state is split into.
        prompt: the prompt.
        decoder: the model.
        bias: there is a bias component.
    """
    description = source.describe(prompt, decoder)
    layers = source.layers(len(decoder.blocks))
    names, positions = [], []
    for layer, group in zip(layers, description.names, strict=True):
        last = [f"layer {layer} bias" if len(layers) > 1 else "bias"] if bias else []
        names += [*group, *last]
        positions += [*description.positions, *([None] * len(last))]
    return names, positions
