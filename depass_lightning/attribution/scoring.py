"""Scores of targets: components carried to them, or targets taken back to the components.

A batch has one target a prompt. Several targets of one prompt share its recorded pass, and under a competing
rule one sweep too: components are carried to all targets' places at once, since what they are there does not
depend on what is read. A linear rule goes back from each target by itself.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.attribution.forward import carry_to
from depass_lightning.attribution.settings import Settings
from depass_lightning.engine.adjoint import TargetGradient, at_readout, backward
from depass_lightning.engine.component_groups import NeuronGroup
from depass_lightning.engine.isolation import exact
from depass_lightning.engine.record import Recording
from depass_lightning.engine.rules import LinearPaths, SoftmaxRule
from depass_lightning.engine.variants.rounding import rounding_scores
from depass_lightning.engine.variants.top_neurons import TopNeuronApproximation
from depass_lightning.errors import DePassError
from depass_lightning.prompts import Prompt
from depass_lightning.sources import Neurons, Source, SplitContext


@dataclass(frozen=True)
class Readout:
    """How the targets of a batch are read from the states where they stand.

    Args:
        layer: where they stand; the number of blocks is behind the last one.
        positions: `[batch]` each prompt's position.
        vectors: `[batch, hidden]` what the state is multiplied with.
        constants: `[batch]` what is added.
        values: `[batch]` the model's own values of the targets.
        normed: the state is read behind the final norm.
    """

    layer: int
    positions: Tensor
    vectors: Float[Tensor, "batch hidden"]
    constants: Float[Tensor, "batch"]
    values: Float[Tensor, "batch"]
    normed: bool

    def derivative(self, recording: Recording) -> TargetGradient:
        """The targets' derivatives where they are read.

        Args:
            recording: the recorded pass.
        """
        return at_readout(recording, self.positions, self.vectors, self.constants, normed=self.normed)


@dataclass(frozen=True)
class Scored:
    """One prompt's scores for one source.

    Args:
        values: the scores, the bias component's last in each group.
        notes: what is to be said about how they were got.
    """

    values: Float[Tensor, "group component"]
    notes: dict[str, Any]


@dataclass(frozen=True)
class Scores:
    """A batch's scores for one source, one `Scored` a prompt (or a target)."""

    values: Float[Tensor, "batch group component"]
    notes: list[dict[str, Any]]

    def __getitem__(self, row: int) -> Scored:
        return Scored(self.values[row], self.notes[row])


def score_batch(
    recording: Recording, prompts: list[Prompt], settings: Settings, reading: Readout
) -> list[Scores]:
    """Score every source's components for a batch's targets.

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
        if settings.attention_path == "control":
            free = _pulled_back(recording, settings, replace(settings.rule, control=1.0), begin, reading)
            groups = [both - content for both, content in zip(free, groups, strict=True)]
        scores = [Scores(own, [{} for _ in prompts]) for own in groups]
    else:
        scores = [_carried(recording, source, settings, begin, reading) for source in settings.sources]
    return _finished(recording, scores, settings, [reading])


def score_targets(
    recording: Recording, prompt: Prompt, settings: Settings, readings: list[Readout]
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
        for own in source.per_layer(recording.layers):
            per_layer = [_uncarried(recording, own, settings, begin, reading) for reading in readings]
            scores = [each for each in per_layer if each is not None]
            parts.append(_of_targets(scores or [_carried_to_all(recording, own, settings, begin, readings)]))
        found.append(_joined(parts))
    return _finished(recording, found, settings, readings)


def _finished(
    recording: Recording, scores: list[Scores], settings: Settings, readings: Sequence[Readout]
) -> list[Scores]:
    """Put the bias component, which is carried first, behind the others of its group, and rounding last.

    Args:
        recording: the recorded pass.
        scores: of each source, all readings one behind the other.
        settings: how the pass is made.
        readings: how the targets were read, all at one layer.
    """
    if settings.bias:
        scores = [
            replace(own, values=torch.cat([own.values[..., 1:], own.values[..., :1]], -1)) for own in scores
        ]
    if not settings.rounding:
        return scores
    first = min(source.layers(recording.layers)[0] for source in settings.sources)
    each = [_rounding(recording, settings, reading, first) for reading in readings]
    found = []
    for own, source in zip(scores, settings.sources, strict=True):
        layers = source.layers(recording.layers)
        rounded = torch.cat(
            [torch.stack([sums[layer][source.behind_mlp] for layer in layers], 1) for sums in each]
        )
        found.append(replace(own, values=torch.cat([own.values, rounded[..., None]], -1)))
    return found


def _rounding(
    recording: Recording, settings: Settings, reading: Readout, first: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """What rounding from each block on adds to the targets, that of the logits themselves included."""
    derivative = reading.derivative(recording)
    batch = torch.arange(len(reading.positions), device=reading.positions.device)
    place = batch, reading.positions
    read = (derivative.states[place] * recording.state(reading.layer)[place]).sum(1) + derivative.constants
    last = reading.values.to(read) - read
    sums = rounding_scores(recording, settings.rule, derivative, layer=reading.layer, first=first)
    return {layer: (before + last, behind + last) for layer, (before, behind) in sums.items()}


def _carried(
    recording: Recording, source: Source, settings: Settings, begin: SplitContext, reading: Readout
) -> Scores:
    """Scores by carrying components to the target."""
    parts = []
    for own in source.per_layer(recording.layers):
        scores = _uncarried(recording, own, settings, begin, reading)
        if scores is None:
            carry = carry_to(recording, own, settings, begin, reading.layer, reading.positions[:, None])
            states = carry.read(recording.final_norm) if reading.normed else carry.dense()
            values = (states[:, :, 0] @ reading.vectors[:, :, None])[:, :, 0]
            if settings.spread is not None:
                values = settings.spread.summed(values)
            values = values.unflatten(1, (carry.layout.groups, -1))
            if settings.bias:
                values[:, :, 0] += reading.constants[:, None]
            scores = Scores(values, [{} for _ in values])
        parts.append(scores)
    return _joined(parts)


def _carried_to_all(
    recording: Recording, source: Source, settings: Settings, begin: SplitContext, readings: list[Readout]
) -> Scores:
    """Scores by carrying components to all targets, which are then read place by place to bound memory."""
    places, of_target = torch.cat([reading.positions for reading in readings]).unique(return_inverse=True)
    decoder = recording.decoder
    # At more places than a head has values, attention costs less done everywhere.
    few = len(places) <= decoder.hidden_size // decoder.heads
    kept = places[None] if few else None
    carry = carry_to(recording, source, settings, begin, readings[0].layer, kept)
    vectors = torch.cat([reading.vectors for reading in readings])
    constants = torch.cat([reading.constants for reading in readings])
    scores = vectors.new_zeros(len(vectors), carry.layout.components)
    with exact(vectors.device):
        for index, place in enumerate(torch.arange(len(places), device=places.device) if few else places):
            here = carry.at(place.view(1, 1))
            states = here.read(recording.final_norm) if readings[0].normed else here.dense()
            own = of_target == index
            scores[own] = vectors[own] @ states[0, :, 0].T
    if settings.spread is not None:
        scores = settings.spread.summed(scores)
    grouped = scores.unflatten(1, (carry.layout.groups, -1))
    if settings.bias:
        grouped[:, :, 0] += constants[:, None]
    return Scores(grouped, [{} for _ in readings])


def _uncarried(
    recording: Recording, source: Source, settings: Settings, begin: SplitContext, reading: Readout
) -> Scores | None:
    """Scores, the bias component first, of neurons that need not all be carried to the target.

    Returns:
        None where they must be, or the components are no neurons.
    """
    if not isinstance(source, Neurons):
        return None
    (layer,) = source.layers(recording.layers)
    near = reading.layer - layer
    if near > 1 and (source.top is None or near == 2):
        return None
    split = source.split(recording, begin)
    group = None if near < 1 else split.inside(recording.block(layer), "after")
    if not isinstance(group, NeuronGroup):
        raise DePassError(f"neurons of block {layer} begin behind layer {reading.layer}; take a later layer")
    derivative = reading.derivative(recording)
    if near == 1:
        batch = torch.arange(len(reading.positions), device=reading.positions.device)
        values, notes = group.read(reading.positions, derivative.states[batch, reading.positions]), None
    else:
        assert isinstance(settings.rule, SoftmaxRule)
        assert source.top is not None
        bulk = TopNeuronApproximation(
            recording, split, group, settings.rule, derivative, reading.positions, layer + 1, reading.layer
        )
        values, estimates = bulk.estimate(source.top)
        notes = [{"approximation": asdict(estimate)} for estimate in estimates]
    if settings.bias:
        values[:, 0] += derivative.constants
    return Scores(values[:, None], notes or [{} for _ in values])


def _of_targets(each: Sequence[Scores]) -> Scores:
    """Several targets' scores of the same components, each of them read by itself."""
    return Scores(torch.cat([own.values for own in each]), [note for own in each for note in own.notes])


def _joined(parts: list[Scores]) -> Scores:
    """One source's scores from those of its groups; of approximations the worst is noted."""
    notes = []
    for own in zip(*(part.notes for part in parts), strict=True):
        made = [note["approximation"] for note in own if note]
        worst = {
            name: pick(each[name] for each in made)
            for name, pick in (("top", min), ("relative_change", max), ("spearman", min))
            if made
        }
        notes.append({"approximation": worst} if made else {})
    return Scores(torch.cat([part.values for part in parts], 1), notes)


def _pulled_back(
    recording: Recording, settings: Settings, rule: LinearPaths, begin: SplitContext, reading: Readout
) -> list[Tensor]:
    """Scores of all sources from one backward pass."""
    derivative = reading.derivative(recording)
    wanted = [source.layers(recording.layers) for source in settings.sources]
    scores: list[dict[int, Tensor]] = [{} for _ in settings.sources]
    first = min(layers[0] for layers in wanted)
    for at in backward(recording, rule, derivative, layer=reading.layer, first=first):
        for source, layers, own in zip(settings.sources, wanted, scores, strict=True):
            if at.block.index in layers:
                found = source.inside_scores(at, begin)
                if found is None:
                    found = source.entry_scores(recording, begin, at.block.index, at.entry)
                assert found is not None
                own[at.block.index] = found
    return [torch.stack([own[layer] for layer in sorted(own)], 1) for own in scores]
